"""Rows of a prompt file, decoded when they are asked for: a million lines are one buffer and a few numbers each.

A prompt is known by a hash of 64 bits; two different ones share it with probability 3e-8 in a million.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]
PART = 2**16  # rows looked at in one go


def check_row(row: Any, names: set[str], place: str) -> None:
    """ValueError unless a row has these columns and a text among them as its prompt."""
    if set(row) != names or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{place} has columns {sorted(row)}: every row needs "prompt" (text) and the same columns')


class Store:
    """Every row of one file, with the columns of `default` where a row has none of them."""

    def __init__(self, path: Path, num: int, lines: NDArray[Any] | range, default: Row):
        self.path, self.num, self.lines, self.default = path, num, lines, default

    def row(self, i: int) -> Row:
        """Columns of row i."""
        raise NotImplementedError

    def place(self, i: int) -> str:
        """Where row i was read."""
        return f"{self.path}:{self.lines[i]}"

    def text(self, i: int) -> bytes:
        """The prompt of row i."""
        prompt: str = self.row(i)["prompt"]
        return prompt.encode()

    def prompts(self) -> Iterator[str | bytes]:
        """Of every row; ValueError names the first row that has other columns than the first."""
        names = set(self.row(0)) if self.num else set()
        for i in range(self.num):
            row = self.row(i)
            check_row(row, names, self.place(i))
            yield row["prompt"]

    @cached_property
    def keys(self) -> NDArray[np.int64]:
        """(rows,) hashes of the prompts; equal prompts have equal ones, in this process."""
        return np.fromiter(map(hash, self.prompts()), np.int64, self.num)

    @cached_property
    def ranks(self) -> NDArray[np.int32]:
        """(rows,) where each row's prompt stands among the distinct ones, by the first 64 bits of their SHA-256."""
        _, first, which = np.unique(self.keys, return_index=True, return_inverse=True)
        digests = (int.from_bytes(hashlib.sha256(self.text(i)).digest()[:8], "big") for i in map(int, first))
        rank = np.empty(len(first), np.int32)
        rank[np.argsort(np.fromiter(digests, np.uint64, len(first)), kind="stable")] = np.arange(len(first))
        return rank[which.reshape(-1)]


class TextStore(Store):
    """Rows are bytes begin[i]:end[i] of `data`; `read` makes one of its text and its place, None: a prompt alone."""

    def __init__(
        self,
        path: Path,
        data: bytes | bytearray,
        spans: tuple[NDArray[np.int64], NDArray[np.int64]],
        lines: NDArray[Any],
        default: Row,
        read: Callable[[str, str], Row] | None = None,
    ):
        super().__init__(path, len(lines), lines, default)
        self.data, (self.begin, self.end), self.read = data, spans, read

    def row(self, i: int) -> Row:
        text = self._bytes(i).decode()
        return self.default | ({"prompt": text} if self.read is None else self.read(text, self.place(i)))

    def text(self, i: int) -> bytes:
        return super().text(i) if self.read else self._bytes(i)

    def _bytes(self, i: int) -> bytes:
        return bytes(self.data[self.begin[i] : self.end[i]])

    def prompts(self) -> Iterator[str | bytes]:
        if self.read is not None:
            yield from super().prompts()
            return
        for part in range(0, self.num, PART):
            spans = (edge[part : part + PART].tolist() for edge in (self.begin, self.end))
            yield from (bytes(self.data[a:b]) for a, b in zip(*spans, strict=True))


class TableStore(Store):
    """Rows of a table of pyarrow."""

    def __init__(self, path: Path, table: Any, default: Row):
        super().__init__(path, table.num_rows, range(1, 1 + table.num_rows), default)
        self.columns = {name: table.column(name) for name in table.column_names}

    def row(self, i: int) -> Row:
        return self.default | {name: column[i].as_py() for name, column in self.columns.items()}


class FileRows(Sequence[Row]):
    """Some rows of a file, all of them unless `which` says so."""

    def __init__(self, store: Store, which: NDArray[np.int32] | None = None):
        self.store, self.which = store, which

    def __len__(self) -> int:
        return self.store.num if self.which is None else len(self.which)

    def _number(self, i: int) -> int:
        """Of row i in the file."""
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return int(range(len(self))[i] if self.which is None else self.which[i])

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return tuple(self[k] for k in range(*i.indices(len(self))))
        return self.store.row(self._number(i))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @property
    def keys(self) -> NDArray[np.int64]:
        """(rows,) hashes of the prompts."""
        return self.store.keys if self.which is None else self.store.keys[self.which]

    @property
    def places(self) -> Places:
        """Where each row was read, FILE:LINE."""
        return Places(self)


class Places(Sequence[str]):
    """FILE:LINE of each of some rows."""

    def __init__(self, rows: FileRows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        return self.rows.store.place(self.rows._number(i))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def packed(path: Path, rows: Iterator[tuple[int, Row]], default: Row) -> TextStore:
    """A store of rows of texts by the line that each was read in."""
    data, ends, lines = bytearray(), [0], []
    for line, row in rows:
        data += json.dumps(row, ensure_ascii=False).encode()
        ends.append(len(data))
        lines.append(line)
    edges = np.array(ends, np.int64)
    return TextStore(path, data, (edges[:-1], edges[1:]), np.array(lines, np.int64), default, _loads)


def _loads(text: str, _place: str) -> Row:
    row: Row = json.loads(text)
    return row
