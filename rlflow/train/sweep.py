"""sweep: a table of recipes and seeds, run side by side; prints the plan and its cost first, resumes, aggregates.

Runs lie in FOLDER/name/seed-N. Finished ones are skipped, interrupted ones go on from their last checkpoint. What a
table says: table.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rlflow.comparison.aggregate import aggregate
from rlflow.comparison.suite import Scale, across, scores_of
from rlflow.comparison.suite_page import suite_page
from rlflow.config import recipes
from rlflow.config.schema import Config
from rlflow.parallel.workers import Workers
from rlflow.report.curves import SECONDS
from rlflow.report.glossary import duration
from rlflow.report.metrics_file import last_trained
from rlflow.train.budget import Planned, planned
from rlflow.train.checkpoint import Checkpoints
from rlflow.train.folder import changes
from rlflow.train.table import parse_table, read_table

State = Literal["new", "interrupted", "finished"]


@dataclass(frozen=True)
class Job:
    """One run: a line of the table with one seed."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    seed: int
    config: Config = field(compare=False, repr=False)
    trust_code: bool = False

    @property
    def title(self) -> str:
        """name-seed-N"""
        return f"{self.name}-seed-{self.seed}"

    def folder(self, root: Path) -> Path:
        """Where the run lies."""
        return root / self.name / f"seed-{self.seed}"

    def command(self, root: Path) -> list[str]:
        """The command that starts or resumes it; one thread, since several run side by side."""
        run = self.folder(root)
        resume = ["--resume", "last"] if (run / "config.yaml").exists() else []
        trust = ["--trust-code"] if self.trust_code else []
        arguments = [self.recipe, *self.overrides, "--run", str(run), "--quiet", *trust, *resume]
        # -P: `-m` alone would import any rlflow, yaml, ... that lies where the command stands
        return [sys.executable, "-P", "-m", "rlflow", "train", *arguments]


def plan(table: dict[str, Any], trust_code: bool = False) -> list[Job]:
    """Every run of a table, seed by seed, with its config checked; ValueError names the line that is wrong."""
    checked = parse_table(table)
    jobs = []
    for seed in checked.seeds:
        for run in checked.runs:
            overrides = ("train.threads=1", *checked.overrides, *run.overrides, f"train.seed={seed}")
            try:
                config = recipes.load(run.recipe, overrides, trust_code)
            except ValueError as error:
                raise ValueError(f"run {run.name!r}: {error}") from error
            jobs.append(Job(run.name, run.recipe, overrides, seed, config, trust_code))
    return jobs


def state(job: Job, root: Path) -> State:
    """Where a run stands; ValueError when its folder holds a run of another config."""
    folder = job.folder(root)
    if not (folder / "config.yaml").exists():
        return "new"
    if changed := changes(folder, job.config):
        lines = "\n  ".join(changed)
        raise ValueError(f"{folder} holds a run of another config: remove it, or take another folder\n  {lines}")
    checkpoints = Checkpoints(folder)
    if not checkpoints.all():
        return "interrupted"
    mine = checkpoints.head("last")["trainer"]
    train = job.config.train
    spent = (train.iterations is not None and mine["iteration"] >= train.iterations) or (
        train.minutes is not None and mine["seconds"] >= 60 * train.minutes
    )
    spent = spent or bool(mine.get("stops", {}).get("reason"))
    return "finished" if spent and mine["evaluated"] == mine["iteration"] else "interrupted"


# -- the plan and its cost ------------------------------------------------------------------------


def describe_plan(jobs: Sequence[Job], root: Path, side_by_side: int) -> str:
    """What will run, what is done, how many steps or images the rest comes to, and how long it may take."""
    states = {job: state(job, root) for job in jobs}
    costs = {job.name: planned(job.config, job.trust_code) for job in jobs if job.seed == jobs[0].seed}
    lines = []
    for name in dict.fromkeys(job.name for job in jobs):
        mine = [job for job in jobs if job.name == name]
        count = ", ".join(f"{n} {s}" for s in ("finished", "interrupted", "new") if (n := _count(mine, states, s)))
        lines.append(f"  {name}: {mine[0].recipe}, {_budget(mine[0].config, costs[name])}, {len(mine)} seeds ({count})")
    left = [job for job in jobs if states[job] != "finished"]
    total = _total([costs[job.name] for job in left])
    rest = [f"  {text}" for text in (total, _estimate(left, jobs, root, side_by_side)) if text]
    return "\n".join([f"{len(jobs)} runs, {len(left)} to do", *lines, *rest])


def _count(jobs: Sequence[Job], states: dict[Job, State], wanted: str) -> int:
    return sum(states[job] == wanted for job in jobs)


def _budget(config: Config, cost: Planned | None) -> str:
    train = config.train
    parts = [f"{train.iterations} iterations"] if train.iterations else []
    parts += [f"{train.minutes:g} min"] if train.minutes else []
    return " or ".join(parts) + " each" + (f" ({cost.words()})" if cost else "")


def _total(costs: Sequence[Planned | None]) -> str:
    """Of all runs that are not finished; those that tell no number beforehand are counted."""
    known = [cost for cost in costs if cost]
    sums = [
        Planned(sum(cost.num for cost in mine), of, any(cost.most for cost in mine)).words()
        for of in dict.fromkeys(cost.of for cost in known)
        if (mine := [cost for cost in known if cost.of == of])
    ]
    unknown = len(costs) - len(known)
    more = [f"of {unknown} runs it is not known beforehand"] if unknown and known else []
    return "in all " + ", ".join([*sums, *more]) if sums else ""


def _estimate(left: Sequence[Job], jobs: Sequence[Job], root: Path, side_by_side: int) -> str:
    """How long the runs of `left` may take: their minutes, or at the speed of a run of the same name."""
    if not left:
        return "nothing to do"
    trained = {job: _trained(job.folder(root)) for job in jobs}
    speeds: dict[str, float] = {}
    for job, (iteration, seconds) in sorted(trained.items(), key=lambda item: item[1]):
        if iteration:
            speeds[job.name] = seconds / iteration  # of the run that has come farthest
    found = [_seconds(job.config, *trained[job], speeds.get(job.name)) for job in left]
    known = sum(s for s in found if s is not None) / max(1, min(side_by_side, len(left)))
    unknown = sum(s is None for s in found)
    if unknown == len(left):
        return f"all {unknown} count iterations only: how long they take is told once one of each name has run"
    text = f"about {duration(known)} with {side_by_side} side by side, and loading and evaluation on top"
    return text + (f"; {unknown} runs count iterations only, their time is not known yet" if unknown else "")


def _seconds(config: Config, iteration: int, seconds: float, speed: float | None) -> float | None:
    """Seconds of training left after `iteration`, at `speed` seconds an iteration; None where nothing tells."""
    train = config.train
    ends = [60 * train.minutes - seconds] if train.minutes else []
    ends += [speed * (train.iterations - iteration)] if train.iterations and speed is not None else []
    return max(0.0, min(ends)) if ends else None


def _trained(run: Path) -> tuple[int, float]:
    """(iterations, seconds) of training so far."""
    row = last_trained(run)
    return (int(row["iteration"]), float(row[SECONDS])) if row else (0, 0.0)


# -- running --------------------------------------------------------------------------------------


def run_sweep(
    path: Path | str, folder: Path | str, *, dry: bool = False, jobs: int | None = None, trust_code: bool = False
) -> dict[str, Any]:
    """Run what is not finished, `jobs` at a time (default: the table's), then write table.json and table.md.

    Of a suite also suite.html.
    """
    root = Path(folder)
    values = read_table(path)
    table, todo = parse_table(values), plan(values, trust_code)
    side_by_side = jobs or table.jobs
    print(describe_plan(todo, root, side_by_side), flush=True)
    if dry:
        return {}
    left = [job for job in todo if not _is_finished(job, root)]
    done = {job.title: partial(_is_finished, job, root) for job in left}
    commands = {job.title: job.command(root) for job in left}
    titles = {job.title: job for job in left}

    def rest(running: Sequence[str]) -> str:
        return _estimate([titles[title] for title in running], todo, root, side_by_side)

    failed = Workers(commands, done, root / "logs", side_by_side, rest).run()
    runs = {name: _folders(todo, name, root) for name in dict.fromkeys(job.name for job in todo)}
    result = aggregate(runs, table.at.minutes, table.at.network_rows, table.at.samples)
    page: Path | None = None
    if crossed := table.crossed():
        scales = {task.name: Scale(task.metric, task.low, task.high) for task in table.tasks}
        finished = {both: runs[run.name] for both, run in crossed.items()}
        said, tables = across(scores_of(finished, scales))
        result = replace(result, values=result.values | {"across": said}, tables=[*tables, *result.tables])
        page = suite_page(said, tables, finished, scales, root / "suite.html")
    for name, text in (("table.json", json.dumps(result.values, indent=1) + "\n"), ("table.md", result.markdown)):
        (root / name).write_text(text, encoding="utf-8")
    print(result.markdown + (f"\ncurves and films: {page}\n" if page else ""))
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(left)} runs failed, the table holds the others:\n  " + "\n  ".join(failed)
        )
    return result.values


def _is_finished(job: Job, root: Path) -> bool:
    return state(job, root) == "finished"


def _folders(jobs: Sequence[Job], name: str, root: Path) -> list[Path]:
    """The finished runs of a name."""
    return [job.folder(root) for job in jobs if job.name == name and _is_finished(job, root)]
