"""Tables of steps in files: npz, parquet. Each column is read from its beginning, some rows at a time."""

from __future__ import annotations

import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from rlflow.datasets.pictures import decode, head
from rlflow.datasets.source import EXTRA, MOST_BYTES, Array, Column

Take = Callable[[int], Array]
"""The next rows (n, ...) of a column."""
BLOCK = 65_536


class Table(ABC):
    """`columns` of `rows` rows; `others` have another number of them."""

    path: Path
    rows: int
    columns: dict[str, Column]
    others: dict[str, int]
    unread: dict[str, str]
    """Columns that are not read, and why."""

    @abstractmethod
    def open(self, name: str, size: tuple[int, int] | None = None) -> Take:
        """A reader of one column, which begins at its first row."""

    def scan(self, name: str) -> Iterator[Array]:
        """A column from its beginning, in blocks."""
        take, rows = self.open(name), self.others.get(name, self.rows)
        for first in range(0, rows, BLOCK):
            yield take(min(BLOCK, rows - first))


def longest(sizes: dict[str, int]) -> int:
    """The number of rows that most columns have."""
    counts = list(sizes.values())
    return max(set(counts), key=lambda n: (counts.count(n), n)) if counts else 0


# -- npz ------------------------------------------------------------------------------------------


class NpzTable(Table):
    """The members of an .npz file, compressed or not; pickled ones are never loaded."""

    def __init__(self, path: Path):
        self.path, self.unread = path, {}
        found: dict[str, tuple[int, Column]] = {}
        with self._zip() as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                try:
                    with archive.open(member) as stream:
                        shape, dtype = _npy_head(stream)
                        body = member.file_size - stream.tell()
                except (ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
                    self.unread[name] = str(error).splitlines()[0]
                    continue
                if math.prod(shape) * dtype.itemsize != body:
                    self.unread[name] = f"holds {body} bytes, not those of {shape} {dtype}"
                elif shape:
                    found[name] = shape[0], Column(shape[1:], dtype)
        self.rows = longest({name: rows for name, (rows, _) in found.items()})
        self.columns = {name: column for name, (rows, column) in found.items() if rows == self.rows}
        self.others = {name: rows for name, (rows, _) in found.items() if rows != self.rows}

    def _zip(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path} is no .npz file: {error}") from None

    def open(self, name: str, size: tuple[int, int] | None = None) -> Take:
        """Bytes are inflated as they are asked for."""
        stream = self._zip().open(f"{name}.npy")
        shape, dtype = _npy_head(stream)
        width = math.prod(shape[1:]) * dtype.itemsize

        def take(num: int) -> Array:
            try:
                data = stream.read(num * width)
            except (zipfile.BadZipFile, OSError, ValueError) as error:
                raise ValueError(f"{self.path}: {name} is damaged: {error}") from None
            return np.frombuffer(data, dtype).reshape(num, *shape[1:])

        return take


def _npy_head(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) of an .npy stream, which is left at its first number; ValueError for what is not plain numbers."""
    version = np.lib.format.read_magic(stream)
    heads = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in heads:
        raise ValueError(f"npy version {version} is not read")
    shape, fortran, dtype = heads[version](stream)
    if dtype.kind not in "biuf":
        raise ValueError("is pickled, which is never loaded" if dtype.hasobject else f"is {dtype}, no numbers")
    if fortran and len(shape) > 1:
        raise ValueError("lies column by column (Fortran order): save it with numpy.ascontiguousarray")
    return shape, dtype


# -- parquet --------------------------------------------------------------------------------------


class ParquetTable(Table):
    """Parquet files, one behind the other; lists of equal lengths are arrays, {bytes, path} are pictures."""

    ROWS = 1024  # that Arrow hands over at once

    def __init__(self, path: Path, files: Sequence[Path]):
        self.path, self.files, self.others, self.unread, self.columns = path, list(files), {}, {}, {}
        self.parquet = _parquet()
        opened = [self.opened(file) for file in self.files]
        if not opened:
            raise ValueError(f"{path} holds no .parquet file")
        self.rows = sum(file.metadata.num_rows for file in opened)
        for name in opened[0].schema_arrow.names:
            try:
                self.columns[name] = self._column(opened[0], name)
            except ValueError as error:
                self.unread[name] = str(error)

    def opened(self, file: Path) -> Any:
        """An opened file, whose parts fit memory."""
        import pyarrow

        try:
            opened = self.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{file}: {error}") from None
        for group in range(opened.metadata.num_row_groups):
            part = opened.metadata.row_group(group)
            if (
                size := max((part.column(i).total_uncompressed_size for i in range(part.num_columns)), default=0)
            ) > MOST_BYTES:
                raise ValueError(
                    f"{file}: row group {group} has a column of {size / 2**30:.1f} GiB: write smaller ones"
                )
        return opened

    def _column(self, file: Any, name: str) -> Column:
        """Shape and dtype, from the type and the first row."""
        import pyarrow

        kind, first = file.schema_arrow.field(name).type, self._first(file, name)
        if pyarrow.types.is_struct(kind) and {f.name for f in kind} >= {"bytes", "path"}:
            if not isinstance(first, dict) or not first["bytes"]:
                raise ValueError("names picture files beside the table, which are not read: embed their bytes")
            return Column(head(first["bytes"], name), np.dtype(np.uint8), coded=True)
        shape: list[int] = []
        while _is_list(kind):
            if first is None or not len(first):
                raise ValueError("its first list is empty")
            shape.append(len(first))
            first, kind = first[0], kind.value_type
        if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_boolean(kind)):
            raise ValueError(f"is {kind}, no numbers")
        return Column(tuple(shape), np.dtype(kind.to_pandas_dtype()))

    def _first(self, file: Any, name: str) -> Any:
        batch = next(file.iter_batches(batch_size=1, columns=[name]), None)
        return batch.column(0)[0].as_py() if batch is not None and len(batch) else None

    def open(self, name: str, size: tuple[int, int] | None = None) -> Take:
        """Batches of Arrow's, as many as the rows asked for need."""
        batches, column = self._batches(name), self.columns[name]
        left: list[Array] = []

        def take(num: int) -> Array:
            while sum(map(len, left)) < num:
                batch = next(batches, None)
                if batch is None:
                    raise ValueError(f"{self.path}: {name} ends before its rows do")
                left.append(self._array(batch, name, column, size))
            joined = np.concatenate(left) if left else np.empty((0, *column.shape), column.dtype)
            left[:] = [joined[num:]]
            return joined[:num]

        return take

    def _batches(self, name: str) -> Iterator[Any]:
        rows = 32 if self.columns[name].coded else self.ROWS
        for file in self.files:
            for batch in self.opened(file).iter_batches(batch_size=rows, columns=[name]):
                yield batch.column(0)

    def _array(self, batch: Any, name: str, column: Column, size: tuple[int, int] | None) -> Array:
        """One batch (n, ...); ValueError for gaps and for lists of unequal lengths."""
        import pyarrow.compute

        if column.coded:
            return np.stack([decode(p["bytes"], column.shape, size, f"{self.path}: {name}") for p in batch.to_pylist()])
        num, values = len(batch), getattr(batch, "storage", batch)
        for length in column.shape:
            if (
                values.null_count
                or pyarrow.compute.any(pyarrow.compute.not_equal(values.value_lengths(), length)).as_py()
            ):
                raise ValueError(f"{self.path}: {name} has gaps, or lists that are not all {length} long")
            values = values.flatten()
        if values.null_count:
            raise ValueError(f"{self.path}: {name} has gaps")
        return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(num, *column.shape).astype(column.dtype)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_fixed_size_list(kind) or types.is_large_list(kind))


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: {EXTRA}", name=error.name) from None
    return pyarrow.parquet
