"""Many runs in one table: mean and sd over seeds of every held-out metric before and after, cost, and at equal cost.

"At a budget" means what the trainer means by it: a run goes on until the budget is spent, so the last evaluation
that counts is the one after the iteration in which the budget ran out. A run that never spent it has no entry.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlflow.report.curves import NETWORK_ROWS, SAMPLES, SECONDS
from rlflow.report.glossary import MISSING, describe, duration, share, show, signed
from rlflow.report.metrics_file import Row
from rlflow.report.record import RunRecord
from rlflow.report.tables import Table

COSTS = {"seconds": SECONDS, "network_rows": NETWORK_ROWS, "samples": SAMPLES}
UNITS = {NETWORK_ROWS: "network rows", SAMPLES: "images or env steps"}
TRAINING = ("kl/ref", "policy/approx_kl", "policy/clip_frac")
LAST = 10  # iterations over which a training metric is averaged


@dataclass(frozen=True)
class Spread:
    """Mean, sample sd (nan for one) and number of what is finite."""

    mean: float
    sd: float
    num: int

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """Of any numbers; nan ones are left out."""
        kept = [float(v) for v in values if math.isfinite(v)]
        if not kept:
            return Spread(math.nan, math.nan, 0)
        return Spread(statistics.fmean(kept), statistics.stdev(kept) if len(kept) > 1 else math.nan, len(kept))

    def words(self, say: Any = share) -> str:
        """.62 ± .02"""
        return say(self.mean) + (f" ± {share(self.sd)}" if math.isfinite(self.sd) else "")

    def as_json(self) -> dict[str, float | int | None]:
        """null for nan."""
        return {"mean": _null(self.mean), "sd": _null(self.sd), "num": self.num}


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Aggregate:
    """The tables as JSON values and as words."""

    values: dict[str, Any]
    tables: list[Table]

    @property
    def markdown(self) -> str:
        """All tables under headings."""
        parts = ["# Sweep", "Mean ± sd over seeds."]
        for table in self.tables:
            parts += [f"## {table.title}", table.markdown()]
        return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Line:
    """The runs of one name: one line of every table."""

    name: str
    runs: list[RunRecord]

    @property
    def recipe(self) -> str:
        """Of the first run."""
        return self.runs[0].recipe

    @property
    def control(self) -> bool:
        """True where rewards were shuffled across the batch."""
        return bool(self.runs[0].setting("train.permute_rewards", False))

    @property
    def label(self) -> str:
        """The name, and that it is a control."""
        return f"{self.name} (control)" if self.control and "control" not in self.name else self.name

    def before_after(self, metric: str) -> tuple[Spread, Spread, Spread]:
        """First and last evaluation of each run, and their difference, over seeds."""
        ends = [_ends(run, metric) for run in self.runs]
        gains = Spread.of(run.gain(metric) for run in self.runs)
        return Spread.of(a for a, _ in ends), Spread.of(b for _, b in ends), gains

    def spent(self, cost: str) -> Spread:
        """Cost of the whole run."""
        return Spread.of(run.last(cost) for run in self.runs)

    def training(self, metric: str) -> Spread:
        """Mean of a training metric over the last iterations."""
        return Spread.of(Spread.of(run.train[-LAST:].column(metric)).mean for run in self.runs)


def _ends(run: RunRecord, metric: str) -> tuple[float, float]:
    seen = [float(row[metric]) for row in run.evals if math.isfinite(row.get(metric, math.nan))]
    return (seen[0], seen[-1]) if seen else (math.nan, math.nan)


def aggregate(
    folders: Mapping[str, Sequence[Path]],
    minutes: Sequence[float] = (),
    network_rows: Sequence[float] = (),
    samples: Sequence[float] = (),
) -> Aggregate:
    """Runs by name, each with its seeds; see `summarise`."""
    lines = [Line(name, [RunRecord.read(folder) for folder in runs]) for name, runs in folders.items() if runs]
    return summarise(lines, minutes, network_rows, samples)


def summarise(
    lines: Sequence[Line],
    minutes: Sequence[float] = (),
    network_rows: Sequence[float] = (),
    samples: Sequence[float] = (),
) -> Aggregate:
    """Before and after, and at budgets; those of time and rows default to the largest that every run spent."""
    lines = ordered(lines)
    metrics = heldout(run for line in lines for run in line.runs)
    budgets = [(SECONDS, 60 * m) for m in minutes] or _common(lines, SECONDS)
    budgets += [(NETWORK_ROWS, float(n)) for n in network_rows] or _common(lines, NETWORK_ROWS)
    budgets += [(SAMPLES, float(n)) for n in samples]
    values = {
        "runs": {line.name: _whole(line, metrics) for line in lines},
        "at": [
            {
                "cost": cost,
                "budget": budget,
                "runs": {line.name: _at_json(line, metrics, cost, budget) for line in lines},
            }
            for cost, budget in budgets
        ],
    }
    tables = [_table_at(lines, metrics, cost, budget) for cost, budget in budgets]
    return Aggregate(values, [_table_whole(lines, metrics), *tables])


def heldout(runs: Iterable[RunRecord]) -> list[str]:
    """The held-out metrics of all runs, each once."""
    return list(dict.fromkeys(name for run in runs for name in run.heldout))


def ordered(lines: Sequence[Line]) -> list[Line]:
    """A control beside the runs of its recipe."""
    recipes = list(dict.fromkeys(line.recipe for line in lines))
    return sorted(lines, key=lambda line: (recipes.index(line.recipe), line.control))


def _common(lines: Sequence[Line], cost: str) -> list[tuple[str, float]]:
    """The largest budget that every run spent."""
    reached = [run.evals[-1].get(cost, 0.0) for line in lines for run in line.runs if run.evals]
    return [(cost, min(reached))] if reached and min(reached) > 0 else []


def eval_at(run: RunRecord, cost: str, budget: float) -> Row | None:
    """The last evaluation within a budget; None where the run did not spend it."""
    spent = zip(run.train.iteration.tolist(), run.train.column(cost).tolist(), strict=True)
    totals = {0: 0.0} | {iteration: total for iteration, total in spent if math.isfinite(total)}
    if max(totals.values()) < budget:
        return None
    fits = [row for row in run.evals if row["iteration"] == 0 or totals.get(row["iteration"] - 1, math.inf) < budget]
    return fits[-1] if fits else None


# -- JSON -----------------------------------------------------------------------------------------


def _whole(line: Line, metrics: Sequence[str]) -> dict[str, Any]:
    columns = ("before", "after", "difference")
    return {
        "recipe": line.recipe,
        "control": line.control,
        "seeds": [run.setting("train.seed") for run in line.runs],
        "metrics": {m: dict(zip(columns, (s.as_json() for s in line.before_after(m)), strict=True)) for m in metrics},
        "cost": {name: line.spent(cost).as_json() for name, cost in COSTS.items()},
        "iterations": Spread.of(run.iterations for run in line.runs).as_json(),
        "training": {m: line.training(m).as_json() for m in TRAINING},
    }


def _at(line: Line, metrics: Sequence[str], cost: str, budget: float) -> tuple[dict[str, Spread], Spread, Spread]:
    """Metrics, the cost at which they were evaluated, and the iterations, over the seeds that spent the budget."""
    rows = [row for run in line.runs if (row := eval_at(run, cost, budget)) is not None]
    at = {m: Spread.of(row.get(m, math.nan) for row in rows) for m in metrics}
    return at, Spread.of(row[cost] for row in rows), Spread.of(row["iteration"] for row in rows)


def _at_json(line: Line, metrics: Sequence[str], cost: str, budget: float) -> dict[str, Any]:
    at, spent, iterations = _at(line, metrics, cost, budget)
    found = {m: s.as_json() for m, s in at.items()}
    return {"metrics": found, "spent": spent.as_json(), "iterations": iterations.as_json()}


# -- words ----------------------------------------------------------------------------------------


def _table_whole(lines: Sequence[Line], metrics: Sequence[str]) -> Table:
    shown = [m for m in TRAINING if any(line.training(m).num for line in lines)]
    labels = [describe(m).label for m in [*metrics, *shown]]
    header = ["run", "seeds", *labels, "iterations", "training time", *UNITS.values()]
    return Table("Before and after", header, [_row_whole(line, metrics, shown) for line in lines])


def _row_whole(line: Line, metrics: Sequence[str], shown: Sequence[str]) -> list[str]:
    iterations = Spread.of(run.iterations for run in line.runs)
    return [
        line.label,
        str(len(line.runs)),
        *(_change(*line.before_after(m)) for m in metrics),
        *(line.training(m).words() for m in shown),
        show(iterations.mean),
        duration(line.spent(SECONDS).mean),
        *(_whole_number(line.spent(cost)) for cost in UNITS),
    ]


def _whole_number(spent: Spread) -> str:
    return show(round(spent.mean)) if spent.num else MISSING


def _change(before: Spread, after: Spread, difference: Spread) -> str:
    if not before.num:
        return MISSING
    return f"{before.words()} \N{RIGHTWARDS ARROW} {after.words()} ({difference.words(signed)})"


def _table_at(lines: Sequence[Line], metrics: Sequence[str], cost: str, budget: float) -> Table:
    header = ["run", "seeds", *(describe(m).label for m in metrics), "iterations", "evaluated at"]
    say = duration if cost == SECONDS else show
    rows = []
    for line in lines:
        at, spent, iterations = _at(line, metrics, cost, budget)
        where = say(round(spent.mean)) if spent.num else "budget not spent"
        rows.append([line.label, str(spent.num), *(at[m].words() for m in metrics), show(iterations.mean), where])
    said = f"{duration(budget)} of training" if cost == SECONDS else f"{show(budget)} {UNITS[cost]}"
    return Table(f"At {said}", header, rows)
