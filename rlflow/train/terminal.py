"""What a person sees while a run trains: a live bar on a terminal, plain lines in a file or a pipe.

Every number printed says what it is.
"""

from __future__ import annotations

import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from rlflow.report.glossary import HELDOUT, describe, duration, headline, show
from rlflow.train.budget import Budget

SHOWN = {  # while training, in this order
    "reward/mean": "reward",
    "rollout/episode_return": "return",
    "rollout/success": "success",
    "reward/masked_frac": "without a score",
    "kl/ref": "KL to reference",
    "policy/approx_kl": "KL of update",
    "policy/clip_frac": "clip fraction",
    "perf/samples_per_s": "images/s",
    "perf/env_steps_per_s": "env steps/s",
    "optim/skipped_steps": "skipped steps",
}
ONLY_WHERE_ABOVE_0 = ("reward/masked_frac", "optim/skipped_steps")
PLAIN_SECONDS = 10.0


def numbers(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(what it is, its value) of the numbers shown while training; what should be 0 only where it is not."""
    shown = [name for name in SHOWN if name in metrics and (metrics[name] or name not in ONLY_WHERE_ABOVE_0)]
    return [(SHOWN[name], show(float(metrics[name]), "nan")) for name in shown]


class Evaluations:
    """Remembers the first and the last held-out evaluation, and words them."""

    def __init__(self) -> None:
        self.first: Mapping[str, float] = {}
        self.last: Mapping[str, float] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take one more evaluation."""
        self.first = self.first or metrics
        self.last = metrics

    def line(self, iteration: int, metrics: Mapping[str, float]) -> str:
        """One line about an evaluation: every held-out number, and what it was at the start."""
        names = [name for name in metrics if name.startswith(HELDOUT)]
        parts = [f"{describe(name).label} {self._against_start(name, metrics)}" for name in names]
        if "time/eval" in metrics:
            parts.append(f"evaluation took {duration(float(metrics['time/eval']))}")
        return f"evaluation after iteration {iteration}: " + ", ".join(parts or ["no held-out metric"])

    def headline(self) -> list[tuple[str, str]]:
        """(what it is, its last value) of the number that counts; nothing before there is one."""
        name = headline(self.last)
        return [] if name is None else [(describe(name).label, self._against_start(name, self.last))]

    def _against_start(self, name: str, metrics: Mapping[str, float]) -> str:
        value = show(float(metrics[name]), "nan")
        started = self.first is not metrics and name in self.first
        return f"{value} (start {show(float(self.first[name]), 'nan')})" if started else value


class Terminal(ABC):
    """Somewhere to show progress; it knows the budget and the evaluations so far."""

    def __init__(self, budget: Budget):
        self.budget, self.evaluations = budget, Evaluations()

    def past(self, evaluations: Sequence[Mapping[str, Any]]) -> None:
        """Take the evaluation rows of the run so far, to compare with; prints nothing."""
        self.evaluations = Evaluations()
        for row in evaluations:
            self.evaluations.add(row)

    @abstractmethod
    def evaluation(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """An evaluation has finished."""

    @abstractmethod
    def progress(self, iteration: int, metrics: Mapping[str, float], seconds_trained: float) -> None:
        """`iteration` iterations are done."""

    @abstractmethod
    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainLines(Terminal):
    """One line at most every ten seconds, and one for every evaluation."""

    def __init__(self, budget: Budget):
        super().__init__(budget)
        self.printed_at = -math.inf
        self.waiting = ""

    def evaluation(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Print the held-out numbers."""
        self.evaluations.add(metrics)
        self._print_waiting()
        print(self.evaluations.line(iteration, metrics), flush=True)

    def progress(self, iteration: int, metrics: Mapping[str, float], seconds_trained: float) -> None:
        """Print a line unless the last one is less than ten seconds old."""
        values = ", ".join(f"{label} {value}" for label, value in numbers(metrics))
        self.waiting = self.budget.place(iteration, seconds_trained) + (f": {values}" if values else "")
        if time.monotonic() - self.printed_at >= PLAIN_SECONDS:
            self._print_waiting()

    def close(self) -> None:
        """Print the last line that was held back."""
        self._print_waiting()

    def _print_waiting(self) -> None:
        if self.waiting:
            print(self.waiting, flush=True)
            self.waiting, self.printed_at = "", time.monotonic()


class LiveView(Terminal):
    """A bar with the time left, and under it the numbers of the last iteration; evaluations scroll above it."""

    def __init__(self, budget: Budget):
        super().__init__(budget)
        self.live: Any = None

    def evaluation(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Print the held-out numbers above the bar."""
        self.evaluations.add(metrics)
        line = self.evaluations.line(iteration, metrics)
        self._start().console.print(line, markup=False, highlight=False)

    def progress(self, iteration: int, metrics: Mapping[str, float], seconds_trained: float) -> None:
        """Redraw the bar and the numbers."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        share = self.budget.done(iteration, seconds_trained)
        known = math.isfinite(share)
        bar = ProgressBar(total=1.0 if known else None, completed=share if known else 0.0, pulse=not known)
        pairs = [*numbers(metrics), *self.evaluations.headline()]
        values = Text("   ").join(Text.assemble((label + " ", "dim"), (value, "bold")) for label, value in pairs)
        lines = Table.grid(expand=True)  # unlike a Group it ends the bar's line
        for line in (self.budget.place(iteration, seconds_trained), bar, values):
            lines.add_row(line)
        self._start().update(lines)

    def close(self) -> None:
        """Stop drawing; the last state stays on the screen."""
        if self.live is not None:
            self.live.stop()
        self.live = None

    def _start(self) -> Any:
        """The running display; it is started by the first thing to show."""
        if self.live is None:
            from rich.live import Live

            self.live = Live(refresh_per_second=4)
            self.live.start()
        return self.live


def make_terminal(total_iterations: int | None, minutes: float | None) -> Terminal:
    """A live view on a terminal, plain lines elsewhere."""
    budget = Budget(total_iterations, minutes)
    live = sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
    return LiveView(budget) if live else PlainLines(budget)
