"""metrics.jsonl: the record of a run that everything else is read from.

One line is one JSON object that ends with a newline; a line without its newline is torn (power, kill -9, full disk), is
never read as valid, and is cut off before the next one is written. Non-finite numbers are null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

METRICS = "metrics.jsonl"
Kind = Literal["train", "eval"]
Row = dict[str, Any]


def read_metrics(folder: str | Path) -> list[Row]:
    """The rows of a run's metrics.jsonl in order, null as nan; a torn last line is left out, no file gives []."""
    path = Path(folder) / METRICS
    return [row for row, _ in _rows(path)] if path.exists() else []


def _rows(path: Path) -> Iterator[tuple[Row, bytes]]:
    """(row, its line) of every whole line; ValueError names a line that is not a row."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # the last has no newline
        try:
            row = json.loads(line)
            row["iteration"], row["kind"] = int(row["iteration"]), str(row["kind"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number} is not a metrics row ({error}): delete that line") from None
        yield {k: math.nan if v is None else v for k, v in row.items()}, line + b"\n"


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
        kept = b"".join(line for row, line in _rows(self.path) if row["iteration"] <= last.get(row["kind"], iteration))
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with open(temporary, "wb") as file:
            file.write(kept)
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
        content = self.path.read_bytes()
        self._shrink(content.rfind(b"\n") + 1)

    def _shrink(self, size: int) -> None:
        if os.fstat(self.handle).st_size > size:
            os.ftruncate(self.handle, size)
