"""Methods over several tasks: every run's last evaluation on a scale of 0 to 1 of its task, and what all say together.

Interquartile mean and probability of improvement, with intervals by the stratified bootstrap, and performance profiles
in place of a table of means (Agarwal et al. 2021, arXiv:2108.13264).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlflow.comparison.stats import improvement_interval, iqm_interval, profile, profile_band
from rlflow.report.glossary import HELDOUT, share
from rlflow.report.record import RunRecord
from rlflow.report.stats import Interval
from rlflow.report.tables import Table

THRESHOLDS = np.linspace(0, 1, 21)
SHOWN = (0.25, 0.5, 0.75, 0.9)
"""Of the profile, in the table of words."""


@dataclass(frozen=True)
class Scale:
    """A task's metric, and what of it counts as 0 and as 1."""

    metric: str = "success"
    low: float = 0.0
    high: float = 1.0

    def score(self, run: RunRecord) -> float:
        """Of a run's last evaluation; nan where it has none."""
        return (run.last(f"{HELDOUT}{self.metric}") - self.low) / (self.high - self.low)


Scores = dict[str, dict[str, NDArray[np.float64]]]
"""By method and task, the finite scores of its seeds (n,)."""


def scores_of(folders: Mapping[tuple[str, str], Sequence[Path]], scales: Mapping[str, Scale]) -> Scores:
    """Of finished runs by (method, task)."""
    found: Scores = {}
    for (method, task), runs in folders.items():
        scores = [scales[task].score(RunRecord.read(folder)) for folder in runs]
        found.setdefault(method, {})[task] = np.array([s for s in scores if math.isfinite(s)])
    return found


def across(scores: Scores) -> tuple[dict[str, Any], list[Table]]:
    """(JSON values, tables). A method is summed up where every task has a run of it; the others are named."""
    every = list(dict.fromkeys(task for tasks in scores.values() for task in tasks))
    whole = {m: [t[name] for name in every] for m, t in scores.items() if all(len(t.get(n, ())) for n in every)}
    values: dict[str, Any] = {
        "tasks": every,
        "scores": {m: {t: s.tolist() for t, s in tasks.items()} for m, tasks in scores.items()},
        "unfinished": [m for m in scores if m not in whole],
        "thresholds": THRESHOLDS.tolist(),
        "methods": {},
    }
    rows = []
    for method, mine in whole.items():
        middle, shares, band = iqm_interval(mine), profile(mine, THRESHOLDS), profile_band(mine, THRESHOLDS)
        better = {other: improvement_interval(mine, theirs) for other, theirs in whole.items() if other != method}
        values["methods"][method] = {
            "iqm": _json(middle),
            "profile": shares.tolist(),
            "band": None if band is None else [bound.tolist() for bound in band],
            "improvement": {other: _json(found) for other, found in better.items()},
        }
        counted = str(sum(map(len, mine)))
        rows.append([method, counted, _words(middle), *(share(float(profile(mine, [t])[0])) for t in SHOWN)])
    header = ["method", "runs", "interquartile mean", *(f"share above {share(t)}" for t in SHOWN)]
    tables = [Table(f"Over {len(every)} tasks, scores from 0 to 1", header, rows)] if rows else []
    return values, tables + _improvements(whole)


def _improvements(whole: Mapping[str, Sequence[NDArray[np.float64]]]) -> list[Table]:
    """Row beats column."""
    names = list(whole)
    if len(names) < 2:
        return []
    rows = [[a, *("" if a == b else _words(improvement_interval(whole[a], whole[b])) for b in names)] for a in names]
    return [Table("Probability that a run of the row beats one of the column", ["", *names], rows)]


def _words(found: Interval) -> str:
    """.62 [.55, .70]"""
    bounds = f" [{share(found.low)}, {share(found.high)}]" if math.isfinite(found.low) else ""
    return share(found.value) + bounds


def _json(found: Interval) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in found]
