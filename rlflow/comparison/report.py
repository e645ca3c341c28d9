"""Several runs together; runs that differ only in their seed form one group: one row and one curve with a band.

`compare_report` writes them as one self-contained page, `figure` draws their held-out metrics alone, for a paper.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlflow.comparison.aggregate import Aggregate, Line, heldout, ordered, summarise
from rlflow.comparison.compare import compare, run_tables
from rlflow.files import write_text
from rlflow.report import page
from rlflow.report.curves import AXES, SAMPLES, Panel, curves, heldout_panels, trade_off
from rlflow.report.glossary import HELDOUT, MISSING, describe, headline
from rlflow.report.metrics_file import Metrics
from rlflow.report.record import RunRecord, run_folders
from rlflow.report.tables import Table

SEED = "train.seed"
SAID_ONCE = ("about", SEED)  # settings that do not make another group
OFF = ("false", "null")  # not worth a word in a label
TRAINING = ("reward/mean", "rollout/episode_return", "kl/ref", "policy/clip_frac", "optim/grad_norm")


def compare_report(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page on the runs in `folders`, folders of runs too, to the file `out`, and return its path."""
    lines = read_lines(folders)
    runs = [run for line in lines for run in line.runs]
    name, summary = headline(heldout(runs)), summarise(lines)
    whole, *budgets = summary.tables
    groups = f"{len(lines)} {'group' if len(lines) == 1 else 'groups'}"
    parts = [
        f'<div class="kicker">rlflow comparison</div><h1>{len(runs)} runs in {groups}</h1>'
        '<p class="soft small">Runs that differ only in their seed form one row and one curve with a band.</p>',
        page.section("Result and cost", whole.html(), "First and last evaluation, mean ± sd over seeds."),
        page.section(f"{describe(name).label} against what it cost", _against_cost(lines, name)) if name else "",
        page.section("At equal cost", "".join(f"<p>{escape(t.title)}</p>{t.html()}" for t in budgets), _BUDGET_NOTE),
        page.section("Held-out metrics", _drawn(lines, heldout_panels(heldout(runs)))),
        page.section("Training", _drawn(lines, [n for n in TRAINING if any(n in run.names for run in runs)])),
        page.section("Runs", _runs_table(lines, name)),
    ]
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page.page("rlflow comparison", parts))
    return path


_BUDGET_NOTE = (
    "A run goes on until the budget is spent; what counts is its last evaluation until then, told under 'evaluated at'."
)


def comparison_tables(folders: Sequence[str | Path]) -> list[Table]:
    """For the terminal: groups of seeds with their spread, or single runs with paired differences; at equal cost."""
    lines = read_lines(folders)
    whole, *budgets = summarise(lines).tables
    if any(len(line.runs) > 1 for line in lines):
        return [whole, *budgets]
    return run_tables(compare(run_folders(folders))) + budgets


def comparison_values(folders: Sequence[str | Path]) -> dict[str, Any]:
    """All of it as JSON values: `compare` run by run, and `groups` as a sweep's table.json has them."""
    summary: Aggregate = summarise(read_lines(folders))
    return compare(run_folders(folders)) | {"groups": summary.values}


def figure(folders: Sequence[str | Path], path: str | Path, x: str = "iterations") -> Path:
    """Draw the held-out metrics over `x` to a .png, .pdf or .svg file, and return its path.

    `x` is a name of AXES, or a held-out metric: then what was paid in it for each of the others.
    """
    lines = read_lines(folders)
    runs = [run for line in lines for run in line.runs]
    if x not in AXES:
        return _trade_off(lines, heldout(runs), x, Path(path))
    panels = [over(panel, x, runs) for panel in heldout_panels(heldout(runs))]
    if not panels:
        raise ValueError("none of these runs has been evaluated")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    curves(_rows(lines), panels, path)
    return Path(path)


def _trade_off(lines: Sequence[Line], known: Sequence[str], x: str, path: Path) -> Path:
    name = HELDOUT + x
    if name not in known:
        metrics = ", ".join(metric.removeprefix(HELDOUT) for metric in known)
        raise ValueError(
            f"--x {x}: choose of {', '.join(AXES)}, or a held-out metric of these runs: {metrics or 'none'}"
        )
    others = [metric for metric in known if metric != name]
    if not others:
        raise ValueError(f"--x {x}: these runs measured no other held-out metric")
    path.parent.mkdir(parents=True, exist_ok=True)
    trade_off(_rows(lines), others, name, path)
    return path


# -- groups ---------------------------------------------------------------------------------------


def read_lines(folders: Sequence[str | Path]) -> list[Line]:
    """The groups of the runs in `folders`; ValueError where there is none."""
    found = run_folders(folders)
    if not found:
        raise ValueError("nothing to compare: give at least one run folder")
    groups = group_runs([RunRecord.read(folder) for folder in found])
    return ordered([Line(label, runs) for label, runs in groups.items()])


def group_runs(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs by recipe; runs of a recipe whose settings differ in more than the seed by recipe and those settings."""
    recipes: dict[str, list[RunRecord]] = {}
    for run in runs:
        recipes.setdefault(run.recipe, []).append(run)
    groups: dict[str, list[RunRecord]] = {}
    for recipe, members in recipes.items():
        settings = _differing([flatten(run.config) for run in members])
        short = [
            ", ".join([recipe, *(f"{k.split('.')[-1]}={v}" for k, v in s.items() if v not in OFF)]) for s in settings
        ]
        full = [", ".join([recipe, *(f"{k}={v}" for k, v in s.items())]) for s in settings]
        for run, label in zip(members, short if len({*short}) == len({*full}) else full, strict=True):
            groups.setdefault(label, []).append(run)
    return groups


def _differing(configs: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Of every config the settings, as text, that are not the same in all."""
    texts = [{key: _text(value) for key, value in config.items() if key not in SAID_ONCE} for config in configs]
    keys = sorted({key for text in texts for key in text})
    differ = [key for key in keys if len({text.get(key) for text in texts}) > 1]
    return [{key: text.get(key, "null") for key in differ} for text in texts]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested config by their dotted path."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return leaves


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# -- curves and runs ------------------------------------------------------------------------------


def _rows(lines: Sequence[Line]) -> dict[str, list[Metrics]]:
    return {line.label: [run.rows for run in line.runs] for line in lines}


def over(panel: Panel, x: str, runs: Sequence[RunRecord]) -> Panel:
    """A panel over another axis; samples are called what they are in these runs."""
    kinds = {run.is_images for run in runs}
    words = {frozenset({True}): "images", frozenset({False}): "environment steps"}
    return panel._replace(x=AXES[x], x_label=words.get(frozenset(kinds), "") if AXES[x] == SAMPLES else "")


def _against_cost(lines: Sequence[Line], name: str) -> str:
    runs = [run for line in lines for run in line.runs]
    known = [x for x, metric in AXES.items() if x == "iterations" or any(metric in run.names for run in runs)]
    return _drawn(lines, [over(Panel(describe(name).label, (name,)), x, runs) for x in known], columns=2)


def _drawn(lines: Sequence[Line], panels: Sequence[str | Panel], columns: int = 3) -> str:
    if not panels:
        return ""
    names = ", ".join(panel if isinstance(panel, str) else panel.title for panel in panels)
    return page.figure(curves(_rows(lines), panels, columns=columns), f"curves of {names}")


def _runs_table(lines: Sequence[Line], name: str | None) -> str:
    rows = [list(_run_row(line.label, run, name)) for line in lines for run in line.runs]
    label = describe(name).label if name else ""
    return page.table(("run", "of", "seed", label, "iterations", "device"), rows, numeric=(2, 4))


def _run_row(label: str, run: RunRecord, name: str | None) -> Iterator[str]:
    change = run.change(name) if name else None
    yield f"<code>{escape(str(run.folder))}</code>"
    yield escape(label)
    yield escape(_text(run.setting(SEED, MISSING)))
    yield MISSING if change is None else escape(change.words("").strip())
    yield str(run.iterations)
    yield escape(str(run.info.get("device", MISSING)))
