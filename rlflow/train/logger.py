"""RunLogger: what a run says while it trains, to metrics.jsonl, tensorboard, wandb and the terminal."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import yaml

from rlflow.config.schema import WandbConfig
from rlflow.report.metrics_file import METRICS, Kind, MetricsFile, encode_row, read_metrics
from rlflow.report.video import gif
from rlflow.train.terminal import Terminal, make_terminal


class Sink(Protocol):
    """Where numbers and pictures go besides metrics.jsonl."""

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Take the finite numbers of one row."""

    def show(self, iteration: int, files: Mapping[str, Path]) -> None:
        """Take pictures (.png) and films (.mp4, .gif) by name."""

    def cut(self, iteration: int) -> None:
        """Forget what came after `iteration`."""

    def close(self) -> None:
        """Flush and close."""


class Tensorboard:
    """Scalars, pictures, films and the config in <run>/tensorboard.

    The writer starts with the first number, since loading it takes seconds.
    """

    def __init__(self, folder: Path, config: str = ""):
        self.folder, self.config = folder, config
        self.purge_step: int | None = None
        self.writer: Any = None

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Write scalars at step `iteration`."""
        writer = self._start()
        for name, value in metrics.items():
            writer.add_scalar(name, value, iteration)

    def show(self, iteration: int, files: Mapping[str, Path]) -> None:
        """Write pictures as they are and films as GIFs, which is what tensorboard plays."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        writer = self._start()
        for name, path in files.items():
            data = path.read_bytes() if path.suffix == ".png" else gif(path)
            width, height = Image.open(io.BytesIO(data)).size
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
            writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), iteration)

    def _start(self) -> Any:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=self.purge_step)
            if self.config:
                self.writer.add_text("config", f"```yaml\n{self.config}```", self.purge_step or 0)
        return self.writer

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
    """All of it on wandb, against our own iteration axis, so that a resumed run may step back."""

    def __init__(self, folder: Path, where: WandbConfig, config: str = ""):
        self.wandb = import_wandb()
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(os.urandom(4).hex())
        self.run = self.wandb.init(
            project=where.project,
            entity=where.entity,
            group=where.group,
            tags=where.tags,
            name=where.name or folder.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(folder),
        )
        # not by init: a resumed run may have another budget, which wandb refuses without a word from us
        self.run.config.update(yaml.safe_load(config) or {}, allow_val_change=True)
        self.run.define_metric("iteration")
        self.run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Send one row."""
        self.run.log({"iteration": iteration, **metrics})

    def show(self, iteration: int, files: Mapping[str, Path]) -> None:
        """Send pictures and films."""
        wandb = self.wandb
        made = {
            n: wandb.Image(str(p)) if p.suffix == ".png" else wandb.Video(str(p), format=p.suffix[1:])
            for n, p in files.items()
        }
        self.run.log({"iteration": iteration, **made})

    def cut(self, iteration: int) -> None:
        """Nothing to do: rows that are logged again carry the same iteration."""

    def close(self) -> None:
        """Finish the wandb run."""
        self.run.finish()


class RunLogger:
    """Writes a run's numbers and shows its progress; one per run, on rank 0 (a folder of None writes nothing).

    `total_iterations` and `minutes` are the budget (whichever ends first), for the progress bar; `config` is the
    resolved one as YAML, for whoever looks at the numbers elsewhere.
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        total_iterations: int | None,
        minutes: float | None,
        config: str = "",
        wandb: WandbConfig | None = None,
        tensorboard: bool = True,
        quiet: bool = False,
    ):
        self.folder = None if folder is None else Path(folder)
        self.sinks: list[Sink] = []
        self.file: MetricsFile | None = None
        self.terminal: Terminal | None = None if quiet else make_terminal(total_iterations, minutes)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.sinks += [Wandb(self.folder, wandb, config)] if wandb is not None else []
            self.sinks += [Tensorboard(self.folder / "tensorboard", config)] if tensorboard else []
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

    def show(self, iteration: int, files: Mapping[str, Path]) -> None:
        """Pictures and films of an evaluation by name, to all sinks."""
        for sink in list(self.sinks) if files else []:
            self._guard(sink, partial(sink.show, iteration, files))

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
            self.terminal.past(read_metrics(self.folder, "eval"))

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
