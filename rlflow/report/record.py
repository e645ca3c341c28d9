"""RunRecord: what a run folder holds, read without running anything; files that are missing or torn are left out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from rlflow.files import read_arrays
from rlflow.registry import TABLE
from rlflow.report.curves import series
from rlflow.report.figures import read_captions
from rlflow.report.glossary import HELDOUT, describe, headline, share, signed
from rlflow.report.metrics_file import Metrics, Row, read_table
from rlflow.report.pairing import NOT_KEPT, Scores, pair
from rlflow.report.stats import Interval

NOT_A_JUDGE = ("strict", "soft", "diversity", "base_distance", "calls")


class Change(NamedTuple):
    """A metric at the first and at the last evaluation; `difference` has bounds where the same rows were scored."""

    before: float
    after: float
    difference: Interval
    num_rows: int = 0
    num_prompts: int = 0
    reason: str | None = None
    """Why the two evaluations are not paired."""

    @property
    def unlike(self) -> bool:
        """True where the two evaluations asked different things: their difference says nothing."""
        return self.reason not in (None, NOT_KEPT)

    def words(self, label: str) -> str:
        """strict accuracy .41 -> .62 (+.21, 95 % paired bootstrap [.15, .27])."""
        return f"{label} {share(self.before)} \N{RIGHTWARDS ARROW} {share(self.after)} ({self.interval_words()})"

    def interval_words(self) -> str:
        """The difference, with its bounds where they are known."""
        value, low, high = self.difference
        known = math.isfinite(low)
        return signed(value) + (f", 95 % paired bootstrap [{share(low)}, {share(high)}]" if known else "")


class Pictures(NamedTuple):
    """Some images (n, 3, H, W) uint8 of an evaluation, their prompts and, where known, whether each is right."""

    images: NDArray[np.uint8]
    captions: list[str]
    marks: list[bool | None]


@dataclass(frozen=True)
class RunRecord:
    """A run folder: run.json, the config as text and as a tree, and the rows of metrics.jsonl."""

    folder: Path
    info: dict[str, Any]
    config_text: str
    rows: Metrics
    _changes: dict[str, Change | None] = field(default_factory=dict)

    @staticmethod
    def read(folder: str | Path) -> RunRecord:
        """FileNotFoundError where `folder` is no run folder; everything in it may be missing."""
        folder = Path(folder)
        if not _is_run(folder):
            raise FileNotFoundError(f"{folder} is not a run folder: it has no config.yaml, run.json or metrics.jsonl")
        return RunRecord(folder, _json(folder / "run.json"), _text(folder / "config.yaml"), read_table(folder))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config, {} where it cannot be read."""
        try:
            values = yaml.safe_load(self.config_text)
        except yaml.YAMLError:
            return {}
        return values if isinstance(values, dict) else {}

    def setting(self, path: str, default: Any = None) -> Any:
        """A value of the config by its dotted path; `default` where it is missing or null."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    def table(self, path: str) -> dict[str, Any]:
        """A section of the config by its dotted path; {} where it is missing."""
        value = self.setting(path, {})
        return value if isinstance(value, dict) else {}

    @property
    def recipe(self) -> str:
        """Name of the recipe, without folder and ending."""
        return Path(str(self.info.get("recipe", "run"))).stem

    @cached_property
    def train(self) -> Metrics:
        """Rows of training iterations."""
        return self.rows.only("train")

    @cached_property
    def evals(self) -> list[Row]:
        """Rows of evaluations, the last one of each iteration, in order."""
        latest = {row["iteration"]: row for row in self.rows.only("eval")}
        return [latest[iteration] for iteration in sorted(latest)]

    @property
    def iterations(self) -> int:
        """Training iterations done."""
        return int(self.train.iteration.max(initial=0))

    @cached_property
    def names(self) -> list[str]:
        """Metrics that have a finite value somewhere, in order of appearance."""
        return [name for name in self.rows.names if np.isfinite(self.rows.column(name)).any()]

    @property
    def headline(self) -> str | None:
        """The metric a verdict is about."""
        return headline(self.names)

    @cached_property
    def heldout(self) -> list[str]:
        """Every held-out metric, in the order of `eval.metrics`."""
        return [name for name in self.names if name.startswith(HELDOUT)]

    @property
    def is_images(self) -> bool:
        """True of a run that makes images; else it acts in a simulator."""
        return bool(self.setting("env.name", "prompt") == "prompt")

    @property
    def judges(self) -> list[str]:
        """Held-out metrics by no reader of a training reward: what should rise although nothing optimises it."""
        trained = {_reader(name) for name, weight in self.table("reward.weights").items() if weight}
        made_by = self.table("eval.metrics")
        short = [n.removeprefix(HELDOUT) for n in self.names if n.startswith(HELDOUT) and "/" not in n[len(HELDOUT) :]]
        distances = ("diversity", "base_distance")
        if not self.is_images:
            return []
        known = [n for n in short if n in made_by and _reader(made_by[n]) not in trained and n not in distances]
        return [HELDOUT + n for n in short if n in known or (n not in made_by and n not in NOT_A_JUDGE)]

    def judge_label(self, name: str) -> str:
        """Label of a held-out metric and the function that computes it."""
        short = name.removeprefix(HELDOUT)
        made_by = self.table("eval.metrics").get(short, short)
        return describe(name).label + (f" ({made_by})" if made_by != short else "")

    def last(self, name: str) -> float:
        """Last value of a metric in the run; nan where it has none."""
        _, ys = series(self.rows, name)
        return float(ys[-1]) if len(ys) else math.nan

    def median(self, name: str) -> float:
        """Median of a metric over the training iterations; nan where it has none."""
        _, ys = series(self.train, name)
        return float(np.median(ys)) if len(ys) else math.nan

    def ends(self, name: str) -> tuple[int, int] | None:
        """First and last iteration at which `name` was evaluated; equal where it was once."""
        at = [row["iteration"] for row in self.evals if math.isfinite(row.get(name, math.nan))]
        return (at[0], at[-1]) if at else None

    def scores(self, iteration: int) -> Scores:
        """Score of every sample of an evaluation by short metric name, and caption_id."""
        found = _arrays(self.folder / "samples" / f"eval_{iteration:06d}.safetensors")
        return {name.removeprefix(HELDOUT): value for name, value in found.items()}

    def change(self, name: str) -> Change | None:
        """How an evaluated metric changed from the first to the last evaluation; None before the first one."""
        if name not in self._changes:
            self._changes[name] = self._change(name)
        return self._changes[name]

    def _change(self, name: str) -> Change | None:
        ends = self.ends(name)
        if ends is None:
            return None
        values = {row["iteration"]: float(row[name]) for row in self.evals if name in row}
        before, after = values[ends[0]], values[ends[1]]
        plain = Change(before, after, Interval(after - before, math.nan, math.nan))
        if ends[0] == ends[1]:
            return plain
        paired = pair(self.scores(ends[0]), self.scores(ends[1]), name.removeprefix(HELDOUT))
        if paired.reason is not None:
            return plain._replace(reason=paired.reason)
        return Change(before, after, paired.difference, paired.num_rows, paired.num_prompts)

    def gain(self, name: str) -> float:
        """Last minus first evaluation; nan before there are two, and where they asked different things."""
        ends, change = self.ends(name), self.change(name)
        if ends is None or change is None or ends[0] == ends[1] or change.unlike:
            return math.nan
        return change.difference.value

    def pictures(self, iteration: int) -> Pictures | None:
        """The fixed prompts' images of an evaluation; None where they were not kept."""
        samples = self.folder / "samples"
        kept = _arrays(samples / f"images_{iteration:06d}.safetensors")
        if not {"images", "index"} <= kept.keys():
            return None
        num = len(kept["images"])
        captions = _captions(samples / f"eval_{iteration:06d}.png")
        captions = captions if len(captions) == num else [""] * num
        right = self.scores(iteration).get("strict")
        known = right is not None and bool(((right == 0) | (right == 1) | np.isnan(right)).all())
        rows = kept["index"].tolist()
        marks = [_mark(float(right[i])) if known and right is not None and i < len(right) else None for i in rows]
        return Pictures(kept["images"], captions, marks)

    def grid(self, iteration: int) -> bytes | None:
        """The captioned picture of an evaluation."""
        path = self.folder / "samples" / f"eval_{iteration:06d}.png"
        return path.read_bytes() if path.exists() else None

    def films(self, iteration: int) -> list[Path]:
        """The films of an evaluation's first episodes, or of its first videos."""
        found = (self.folder / "samples").glob(f"film_{iteration:06d}_*")
        return sorted((f for f in found if f.suffix in (".mp4", ".gif")), key=lambda f: int(f.stem.split("_")[-1]))

    def trend(self, name: str) -> Change | None:
        """A training metric: mean of its first tenth (at least 5 iterations) against that of its last, with bounds.

        Fewer than ten iterations have no bounds.
        """
        _, ys = series(self.train, name)
        if len(ys) < 2:
            return None
        tenth = max(min(5, len(ys) // 2), len(ys) // 10)
        first, last = ys[:tenth], ys[-tenth:]
        before, after = float(first.mean()), float(last.mean())
        if tenth < 5:
            return Change(before, after, Interval(after - before, math.nan, math.nan))
        error = 1.96 * math.sqrt(first.var(ddof=1) / tenth + last.var(ddof=1) / tenth)
        return Change(before, after, Interval(after - before, after - before - error, after - before + error))


def run_folders(paths: Sequence[str | Path]) -> list[Path]:
    """Run folders as they are, and those in a folder of runs (FOLDER/seed-N, FOLDER/name/seed-N); FileNotFoundError."""
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        below = sorted({*path.glob("*/config.yaml"), *path.glob("*/*/config.yaml")})
        found |= dict.fromkeys([path] if _is_run(path) or not below else [file.parent for file in below])
    return list(found)


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "run.json", "metrics.jsonl"))


def _mark(score: float) -> bool | None:
    return None if math.isnan(score) else score == 1


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        return read_arrays(path) if path.exists() else {}
    except ValueError:  # a run killed while it wrote
        return {}


def _captions(path: Path) -> list[str]:
    try:
        return read_captions(path)
    except (OSError, ValueError):
        return []


def _reader(reward: str) -> str:
    """The module of a registered reward: its functions look at a picture with the same eyes (ocr, ocr_exact)."""
    return TABLE["reward"][reward].partition(":")[0] if reward in TABLE["reward"] else reward
