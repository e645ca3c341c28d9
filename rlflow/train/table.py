"""The table of a sweep or a suite, read and checked.

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
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlflow import ranges
from rlflow.config import plain, recipes
from rlflow.config.plain import yaml_errors
from rlflow.envs.captions.files import read_text
from rlflow.ranges import STRICT, Positive, Seed, Size
from rlflow.registry import located, nearest


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
