"""metrics.jsonl: the record of a run that everything else is read from.

One line is one JSON object that ends with a newline; a line without its newline is torn (power, kill -9, full disk), is
never read as valid, and is cut off before the next one is written. Non-finite numbers are null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

METRICS = "metrics.jsonl"
Kind = Literal["train", "eval"]
Row = dict[str, Any]
Array = NDArray[np.float64]
CHUNK = 2000  # rows that are dicts at a time
TAIL = 2**16  # bytes in which the end of the last whole line is looked for, and in those before them
NUMBERS = frozenset((int, float, type(None)))


def read_metrics(folder: str | Path, kind: Kind | None = None) -> list[Row]:
    """The rows of a run's metrics.jsonl in order, null as nan, those of a `kind` if one is named.

    A torn last line is left out; no file gives [].
    """
    path = Path(folder) / METRICS
    rows = _rows(path) if path.exists() else ()
    wanted = (row for row, _ in rows if kind is None or row["kind"] == kind)
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in wanted]


def last_trained(folder: str | Path) -> Row | None:
    """The newest whole row of training, looked for in the last MiB only, since a file may be long; null stays None."""
    path = Path(folder) / METRICS
    if not path.exists():
        return None
    with path.open("rb") as file:
        begin = max(0, os.fstat(file.fileno()).st_size - 16 * TAIL)
        file.seek(begin)
        whole = file.read().split(b"\n")[1 if begin else 0 : -1]
    rows = (json.loads(line) for line in reversed(whole))
    return next((row for row in rows if row["kind"] == "train"), None)


def _rows(path: Path) -> Iterator[tuple[Row, bytes]]:
    """(row, its line) of every whole line, null as None; ValueError names a line that is not a row."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                iteration, kind = int(row.pop("iteration")), str(row.pop("kind"))
                if not NUMBERS.issuperset(map(type, row.values())):
                    raise ValueError("a value is no number")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}, line {number} is not a metrics row ({error}): delete that line") from None
            yield {"iteration": iteration, "kind": kind, **row}, line


class Metrics(Sequence[Row]):
    """Rows by columns, an array each; a row is made when it is asked for, and 100,000 rows take 9 bytes a number."""

    def __init__(self, iteration: NDArray[np.int64], kind: NDArray[np.str_], columns: dict[str, tuple[Array, Any]]):
        self.iteration, self.kind = iteration, kind
        self._columns = columns  # by name: values (n,), and whether the row has one (n,)

    @staticmethod
    def of(rows: Iterable[Mapping[str, Any]]) -> Metrics:
        """Of rows in order, which may come one by one."""
        if isinstance(rows, Metrics):
            return rows
        pieces, left = [], iter(rows)
        while chunk := list(islice(left, CHUNK)):
            pieces += [_piece(names, list(same)) for names, same in groupby(chunk, tuple)]
        total, starts = sum(len(p[0]) for p in pieces), np.cumsum([0, *(len(p[0]) for p in pieces)])
        columns: dict[str, tuple[Array, Any]] = {}
        for (_, _, values), start in zip(pieces, starts, strict=False):
            for name, value in values.items():
                if name not in columns:
                    columns[name] = np.full(total, math.nan), np.zeros(total, dtype=bool)
                columns[name][0][start : start + len(value)] = value
                columns[name][1][start : start + len(value)] = True
        empty: tuple[Any, Any] = np.zeros(0, dtype=np.int64), np.zeros(0, dtype="U5")
        joined = [np.concatenate([p[i] for p in pieces]) if pieces else empty[i] for i in (0, 1)]
        return Metrics(joined[0], joined[1], columns)

    @property
    def names(self) -> list[str]:
        """Of all metrics, in order of appearance."""
        return list(self._columns)

    def column(self, name: str) -> Array:
        """(n,) values of a metric, or of `iteration`; nan where a row has none."""
        if name == "iteration":
            return self.iteration.astype(np.float64)
        return self._columns[name][0] if name in self._columns else np.full(len(self), math.nan)

    def has(self, name: str) -> NDArray[np.bool_]:
        """(n,) whether a row has a value of the metric, finite or not."""
        return self._columns[name][1] if name in self._columns else np.zeros(len(self), dtype=bool)

    def only(self, kind: Kind) -> Metrics:
        """The rows of a kind."""
        return self._at(self.kind == kind)

    def _at(self, index: Any) -> Metrics:
        columns = {n: (v[index], h[index]) for n, (v, h) in self._columns.items()}
        return Metrics(self.iteration[index], self.kind[index], {n: c for n, c in columns.items() if c[1].any()})

    def __len__(self) -> int:
        return len(self.iteration)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Metrics: ...

    def __getitem__(self, index: int | slice) -> Row | Metrics:
        if isinstance(index, slice):
            return self._at(index)
        row = {"iteration": int(self.iteration[index]), "kind": str(self.kind[index])}
        return row | {name: float(value[index]) for name, (value, has) in self._columns.items() if has[index]}


def _piece(names: tuple[str, ...], rows: Sequence[Mapping[str, Any]]) -> tuple[Any, Any, dict[str, Array]]:
    """Iterations, kinds and columns of rows that have the same names in the same order."""
    metrics = [name for name in names if name not in ("iteration", "kind")]
    table = np.array([[row[name] for name in metrics] for row in rows], dtype=np.float64)  # None becomes nan
    iteration = np.array([row.get("iteration", 0) for row in rows], dtype=np.int64)
    kind = np.array([row.get("kind", "train") for row in rows], dtype="U5")
    return iteration, kind, {name: table[:, k] for k, name in enumerate(metrics)}


def read_table(folder: str | Path) -> Metrics:
    """What `read_metrics` returns, by columns."""
    path = Path(folder) / METRICS
    return Metrics.of(row for row, _ in _rows(path)) if path.exists() else Metrics.of([])


def encode_row(iteration: int, kind: Kind, metrics: Mapping[str, float]) -> bytes:
    """One line of metrics.jsonl, newline included; ValueError for an unknown kind or a reserved metric name."""
    if kind not in ("train", "eval"):
        raise ValueError(f"kind is {kind!r}: 'train' or 'eval'")
    if taken := {"iteration", "kind"} & metrics.keys():
        raise ValueError(f"{sorted(taken)} cannot be the name of a metric")
    values = {name: float(value) for name, value in metrics.items()}
    row = {"iteration": iteration, "kind": kind} | {k: v if math.isfinite(v) else None for k, v in values.items()}
    return json.dumps(row, allow_nan=False).encode() + b"\n"


class MetricsFile:
    """metrics.jsonl, open for appending whole lines."""

    def __init__(self, path: Path):
        self.path = path
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._cut_torn_line()

    def append(self, line: bytes) -> None:
        """Write one line; if it does not fit, none of it stays, and OSError says what to do."""
        size = os.lseek(self.handle, 0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += os.write(self.handle, line[written:])
        except OSError as error:
            self._shrink(size)
            raise OSError(
                error.errno,
                f"{error.strerror}: this line of metrics could not be written. The lines before it are intact: "
                "make room and resume the run",
                str(self.path),
            ) from error

    def cut(self, iteration: int, evaluated: int | None = None) -> None:
        """Atomically keep the rows up to and including `iteration`, evaluations up to `evaluated` (default: too)."""
        last = {"train": iteration, "eval": iteration if evaluated is None else evaluated}
        rows = _rows(self.path)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with open(temporary, "wb") as file:
            file.writelines(line for row, line in rows if row["iteration"] <= last.get(row["kind"], iteration))
            file.flush()
            os.fsync(file.fileno())
        self.close()
        os.replace(temporary, self.path)
        self.handle = os.open(self.path, os.O_RDWR)

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self.handle >= 0:
            os.close(self.handle)
        self.handle = -1

    def _cut_torn_line(self) -> None:
        """Found from the end: a line is torn by its last write, and the file may be long."""
        end, begin, newline = os.fstat(self.handle).st_size, 0, -1
        while end > 0:
            begin = max(0, end - TAIL)
            os.lseek(self.handle, begin, os.SEEK_SET)
            newline = os.read(self.handle, end - begin).rfind(b"\n")
            if newline >= 0:
                break
            end = begin
        self._shrink(begin + newline + 1)

    def _shrink(self, size: int) -> None:
        if os.fstat(self.handle).st_size > size:
            os.ftruncate(self.handle, size)
