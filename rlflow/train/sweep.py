"""sweep: a table of recipes and seeds, run side by side; prints the plan and its cost first, resumes, aggregates.

    runs:                       # TABLE.yaml
      - {name: flow_grpo, recipe: t2i_flow_grpo}
      - {name: control, recipe: t2i_flow_grpo, overrides: [train.permute_rewards=true]}
    overrides: [train.minutes=5]    # of every run; its own come after
    seeds: [0, 1, 2]
    jobs: 2                     # processes side by side, one thread each
    at: {minutes: [2.5], network_rows: [50000]}   # budgets to compare at; default: what every run reached

In place of `runs` a suite has tasks and methods, each with each; a run is then called method@task:

    tasks:                      # metric: of the last evaluation; low and high: what counts as 0 and as 1
      - {name: hopper, overrides: [env.name=hopper], metric: return, low: 20, high: 3200}
    methods:                    # as runs; a task's overrides come before a method's
      - {name: flow_g, recipe: robot_sac_flow_g}

Runs lie in FOLDER/name/seed-N. Finished ones are skipped, interrupted ones go on from their last checkpoint.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from rlflow import ranges
from rlflow.comparison.aggregate import aggregate
from rlflow.comparison.suite import Scale, across, scores_of
from rlflow.comparison.suite_page import suite_page
from rlflow.config import plain, recipes
from rlflow.config.plain import yaml_errors
from rlflow.config.schema import Config
from rlflow.envs.captions.files import read_text
from rlflow.parallel.workers import Workers
from rlflow.ranges import STRICT, Positive, Seed, Size
from rlflow.registry import located, nearest
from rlflow.report.curves import SECONDS
from rlflow.report.glossary import duration
from rlflow.report.metrics_file import last_trained
from rlflow.train.budget import Planned, planned
from rlflow.train.checkpoint import Checkpoints
from rlflow.train.folder import changes

State = Literal["new", "interrupted", "finished"]


@dataclass
class RunSpec:
    """One line of the table."""

    __pydantic_config__ = STRICT
    name: str
    recipe: str
    overrides: list[str] = field(default_factory=list)


@dataclass
class TaskSpec:
    """One task of a suite."""

    __pydantic_config__ = STRICT
    name: str
    overrides: list[str] = field(default_factory=list)
    metric: str = "success"  # of eval/heldout/
    low: float = 0.0
    high: float = 1.0


@dataclass
class At:
    """Budgets at which runs are compared."""

    __pydantic_config__ = STRICT
    minutes: list[Positive] = field(default_factory=list)
    network_rows: list[Positive] = field(default_factory=list)
    samples: list[Positive] = field(default_factory=list)  # images, or environment steps


@dataclass
class Table:
    """TABLE.yaml."""

    __pydantic_config__ = STRICT
    runs: list[RunSpec] = field(default_factory=list)
    tasks: list[TaskSpec] = field(default_factory=list)
    methods: list[RunSpec] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    seeds: list[Seed] = field(default_factory=lambda: [0])
    jobs: Size = 1
    at: At = field(default_factory=At)

    def crossed(self) -> dict[tuple[str, str], RunSpec]:
        """Every method on every task, by both names; {} of a table of runs."""
        return {
            (method.name, task.name): RunSpec(
                f"{method.name}@{task.name}", method.recipe, [*task.overrides, *method.overrides]
            )
            for task in self.tasks
            for method in self.methods
        }


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


def read_table(name: Path | str) -> dict[str, Any]:
    """The YAML of a table: a file, or one of those that ship by its name."""
    path, shipped = Path(name), recipes.tables()
    if path.suffix not in (".yaml", ".yml") and str(name) not in shipped:
        raise ValueError(f"no table {str(name)!r}{nearest(str(name), shipped)}; a file ends in .yaml")
    if str(name) not in shipped and not path.is_file():
        raise ValueError(f"no table {str(name)!r}")
    with yaml_errors(f"table {str(name)!r}"), located(f"table {str(name)!r}"):
        values = plain.load(read_text(shipped.get(str(name), path)))
    if not isinstance(values, dict):
        raise ValueError(f"{name}: a table is a YAML mapping with runs, seeds, jobs, at")
    return values


def parse_table(values: dict[str, Any]) -> Table:
    """A checked Table; ValueError names the path of every problem."""
    try:
        plain.check_plain(values)
        table = TypeAdapter(Table).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ValueError("\n".join(_problem(item) for item in error.errors())) from None
    ranges.check("", Table, table)
    if bool(table.tasks) != bool(table.methods) or (table.tasks and table.runs):
        raise ValueError("a table has runs, or else tasks and methods")
    for kind, listed in (("tasks", table.tasks), ("methods", table.methods)):
        named = [one.name for one in listed]
        if bad := sorted({n for n in named if named.count(n) > 1 or "@" in n}):
            raise ValueError(f"{kind}: the names {bad} occur twice, or hold an @")
    if flat := [task.name for task in table.tasks if task.low == task.high]:
        raise ValueError(f"tasks: {flat} count the same number as 0 and as 1: set low and high apart")
    table.runs = table.runs or list(table.crossed().values())
    names = [run.name for run in table.runs]
    if not names or not table.seeds:
        raise ValueError("a table needs at least one run and one seed")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"runs: the names {twice} occur twice")
    if bad := [n for n in names if not n or Path(n).name != n or n.startswith(".")]:
        raise ValueError(f"runs: {bad} cannot name a folder")
    if len(set(table.seeds)) < len(table.seeds):
        raise ValueError(f"seeds: {table.seeds} has one twice")
    return table


def _problem(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        of_lists = TaskSpec if item["loc"][0] == "tasks" else RunSpec
        section: type = {1: Table, 2: At, 3: of_lists}.get(len(item["loc"]), Table)
        return f"{path}: no such setting{nearest(str(item['loc'][-1]), [f.name for f in fields(section)])}"
    return f"{path}: {item['msg']}"


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
