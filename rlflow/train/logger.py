"""RunLogger: what a run says while it trains, to metrics.jsonl, tensorboard, wandb and the terminal.

metrics.jsonl is the record that everything else is read from. One line is one JSON object that ends with a
newline; a line without its newline is torn (power, kill -9, full disk), is never read as valid, and is cut off
before the next one is written. Non-finite numbers are null.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from rlflow.train.terminal import Terminal, make_terminal

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
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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


class Sink(Protocol):
    """Where numbers go besides metrics.jsonl."""

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Take the finite numbers of one row."""

    def cut(self, iteration: int) -> None:
        """Forget what came after `iteration`."""

    def close(self) -> None:
        """Flush and close."""


class Tensorboard:
    """Scalars in <run>/tensorboard; the writer starts with the first number, since loading it takes seconds."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.purge_step: int | None = None
        self.writer: Any = None

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Write scalars at step `iteration`."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=self.purge_step)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, iteration)

    def cut(self, iteration: int) -> None:
        """Have tensorboard hide every step after `iteration` written so far."""
        self.close()
        self.purge_step = iteration + 1

    def close(self) -> None:
        """Flush and close; a later `log` starts a new file."""
        if self.writer is not None:
            self.writer.close()
        self.writer = None


def import_wandb() -> Any:
    """The wandb package; ImportError says how to get it."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError("wandb logging needs the wandb package: pip install wandb, or train.wandb=false") from error
    return wandb


class Wandb:
    """Scalars on wandb against our own iteration axis, so that a resumed run may step back."""

    def __init__(self, folder: Path):
        wandb = import_wandb()
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(os.urandom(4).hex())
        self.run = wandb.init(
            project="rlflow", name=folder.name, id=id_file.read_text().strip(), resume="allow", dir=str(folder)
        )
        self.run.define_metric("iteration")
        self.run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Send one row."""
        self.run.log({"iteration": iteration, **metrics})

    def cut(self, iteration: int) -> None:
        """Nothing to do: rows that are logged again carry the same iteration."""

    def close(self) -> None:
        """Finish the wandb run."""
        self.run.finish()


class RunLogger:
    """Writes a run's numbers and shows its progress; one per run, on rank 0 (a folder of None writes nothing).

    `total_iterations` and `minutes` are the budget (whichever ends first), for the progress bar.
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        total_iterations: int | None,
        minutes: float | None,
        wandb: bool = False,
        tensorboard: bool = True,
        quiet: bool = False,
    ):
        self.folder = None if folder is None else Path(folder)
        self.sinks: list[Sink] = []
        self.file: MetricsFile | None = None
        self.terminal: Terminal | None = None if quiet else make_terminal(total_iterations, minutes)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.sinks += [Wandb(self.folder)] if wandb else []
            self.sinks += [Tensorboard(self.folder / "tensorboard")] if tensorboard else []
            self.file = MetricsFile(self.folder / METRICS)
        self._tell_past()

    def log(self, iteration: int, kind: Kind, metrics: Mapping[str, float]) -> None:
        """Append one row. OSError if metrics.jsonl cannot be written; another sink that fails is dropped."""
        line = encode_row(iteration, kind, metrics)
        if self.file is not None:
            self.file.append(line)
        finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        for sink in list(self.sinks):
            self._guard(sink, partial(sink.log, iteration, finite))
        if kind == "eval" and self.terminal is not None:
            self.terminal.evaluation(iteration, metrics)

    def cut(self, iteration: int, evaluated: int | None = None) -> None:
        """Forget every row after `iteration`, and a torn last line; called when a run resumes from there.

        `evaluated` is the last evaluation that the checkpoint knows of: a later one will be made again.
        """
        if self.file is not None:
            self.file.cut(iteration, evaluated)
        for sink in self.sinks:
            sink.cut(iteration)
        self._tell_past()

    def progress(self, iteration: int, metrics: Mapping[str, float], seconds_trained: float) -> None:
        """Show where the run is after `iteration` iterations and `seconds_trained` seconds of training."""
        if self.terminal is not None:
            self.terminal.progress(iteration, metrics, seconds_trained)

    def close(self) -> None:
        """Flush and close everything; closing twice is fine."""
        if self.terminal is not None:
            self.terminal.close()
        if self.file is not None:
            self.file.close()
        for sink in list(self.sinks):
            self._guard(sink, sink.close)
        self.sinks = []

    def _tell_past(self) -> None:
        """Let the terminal know the evaluations of the run so far, without printing them again."""
        if self.terminal is not None and self.folder is not None:
            self.terminal.past([row for row in read_metrics(self.folder) if row["kind"] == "eval"])

    def _guard(self, sink: Sink, action: Callable[[], None]) -> None:
        """A full disk or a lost connection must not end a run whose metrics.jsonl is fine."""
        try:
            action()
        except Exception as error:
            self.sinks = [s for s in self.sinks if s is not sink]
            warnings.warn(f"{type(sink).__name__} logging stopped ({error}); metrics.jsonl goes on", stacklevel=3)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
