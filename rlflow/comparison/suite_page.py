"""The page of a suite: performance profiles, probabilities of improvement, its tables, curves and films of every task.

Profiles and improvements are drawn as in Agarwal et al. 2021 (arXiv:2108.13264): shares of runs above a score with
pointwise bands, and for each pair of methods a point with its interval beside one half. Films are inside the page,
which loads nothing; only the reports of single runs lie beside it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from rlflow.comparison.report import over
from rlflow.comparison.suite import Scale
from rlflow.files import write_text
from rlflow.report import page
from rlflow.report.beside import episode_words
from rlflow.report.curves import COLORS, SAMPLES, STYLE, Panel, curves_apart
from rlflow.report.glossary import HELDOUT, describe
from rlflow.report.record import RunRecord
from rlflow.report.report import REPORT
from rlflow.report.tables import Table
from rlflow.report.video import html_video

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Mapping[tuple[str, str], Sequence[Path]]
"""Folders of finished runs by (method, task), seed by seed."""
Records = Mapping[tuple[str, str], Sequence[RunRecord]]
"""What they hold."""


def suite_figure(values: Mapping[str, Any]) -> Figure:
    """Of what `across` says: the profiles, and, of two methods or more, who beats whom."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    methods = values["methods"]
    pairs = [(a, b) for i, a in enumerate(methods) for b in list(methods)[i + 1 :]]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4 if pairs else 4.4, max(2.9, 1.2 + 0.28 * len(pairs))), layout="constrained")
        first, *rest = figure.subplots(1, 2 if pairs else 1, squeeze=False)[0]
        _draw_profiles(first, values)
        for ax in rest:
            _draw_improvements(ax, values, pairs)
    return figure


def _draw_profiles(ax: Axes, values: Mapping[str, Any]) -> None:
    for name, found in values["methods"].items():
        color = _color(values, name)
        ax.plot(values["thresholds"], found["profile"], color=color, label=name)
        if found["band"] is not None:
            ax.fill_between(values["thresholds"], *found["band"], color=color, alpha=0.15, linewidth=0)
    ax.set(title="Performance profiles", xlabel="score", ylabel="share of runs above it", ylim=(-0.02, 1.02))
    ax.legend(loc="best", handlelength=1.4, labelspacing=0.3)


def _draw_improvements(ax: Axes, values: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> None:
    for row, (a, b) in enumerate(pairs):
        middle, low, high = values["methods"][a]["improvement"][b]
        color = _color(values, a)
        if low is not None:
            ax.plot([low, high], [row, row], color=color, linewidth=4, alpha=0.3)
        ax.plot([middle], [row], marker="o", color=color)
    ax.axvline(0.5, color="#8A919B", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(pairs)), [f"{a} above {b}" for a, b in pairs])
    ax.set(title="Probability of improvement", xlim=(-0.03, 1.03), ylim=(len(pairs) - 0.5, -0.5))


def _color(values: Mapping[str, Any], method: str) -> str:
    """One in all figures of the page, of methods that are not summed up too."""
    return COLORS[list(values["scores"]).index(method) % 8]


def curves_figure(runs: Records, scales: Mapping[str, Scale]) -> Figure | None:
    """A panel for each task with an evaluated run: its metric over images or environment steps, where all tell them."""
    panels, methods = [], dict.fromkeys(method for method, _ in runs)
    for task, scale in scales.items():
        mine = {method: runs.get((method, task), ()) for method in methods}
        every = [run for seeds in mine.values() for run in seeds]
        name = f"{HELDOUT}{scale.metric}"
        if any(name in run.names for run in every):
            x = "samples" if all(SAMPLES in run.names for run in every) else "iterations"
            panel = over(Panel(f"{task}: {describe(name).label}", (name,)), x, every)
            panels.append((panel, {method: [run.rows for run in seeds] for method, seeds in mine.items()}))
    return curves_apart(panels) if panels else None


def suite_page(
    values: Mapping[str, Any], tables: Sequence[Table], runs: Runs, scales: Mapping[str, Scale], out: Path
) -> Path:
    """Write the page to `out`, in the folder of the suite: `values` and `tables` are those of `across`."""
    read = {both: [RunRecord.read(folder) for folder in folders] for both, folders in runs.items()}
    tasks, unfinished = ", ".join(values["tasks"]), ", ".join(values["unfinished"])
    left = (
        f'<p class="soft small">Not summed up, for a task is missing: {escape(unfinished)}.</p>' if unfinished else ""
    )
    many = f"{len(values['scores'])} methods on {len(values['tasks'])} tasks"
    drawn = page.figure(suite_figure(values), "performance profiles and probabilities of improvement")
    learnt = curves_figure(read, scales)
    parts = [
        f'<div class="kicker">rlflow suite</div><h1>{many}</h1><p class="soft small">{escape(tasks)}</p>{left}',
        page.section("Over all tasks", drawn if values["methods"] else "", _NOTE),
        *(page.section(table.title, table.html(), note) for table, note in zip(tables, _TABLE_NOTES, strict=False)),
        page.section(
            "Learning curves", page.figure(learnt, "learning curves of every task") if learnt else "", _CURVES
        ),
        page.section("Films", _films(read, scales), _FILMS),
        page.section("Runs", _links([folder for folders in runs.values() for folder in folders], out.parent), _RUNS),
    ]
    write_text(out, page.page("rlflow suite", parts))
    return out


_NOTE = (
    "Scores from 0 to 1 of each task's own scale. Bands and bars are 95 % intervals of the stratified bootstrap: seeds "
    "are drawn inside each task, tasks are not. A curve that lies above another everywhere is of the better method."
)
_TABLE_NOTES = (
    "The interquartile mean leaves out the lowest and the highest quarter of a method's runs. Brackets as above.",
    "Above .5 the method of the row is the better one, where its bracket leaves out .5. Tasks count alike.",
)
_CURVES = (
    "A panel for each task, in the units of its own metric: what every evaluation of the finished runs found, with the "
    "deployment sampler on held-out starts or prompts. Thick: mean of the seeds; band: lowest to highest; thin: each."
)
_FILMS = (
    "Of each method on each task the first episode of the newest filmed evaluation, by the first finished seed that "
    "has one; not chosen by result. eval.video sets how many episodes are filmed."
)
_RUNS = (
    "A link leads to the report of a run, a file beside this page: its metrics, before and after, cost and settings. "
    "Where there is no link there is no report; `rlflow report RUN` writes one."
)


def _films(runs: Records, scales: Mapping[str, Scale]) -> str:
    """By task; tasks and methods without a film are left out."""
    parts = []
    for task in scales:
        shown = [_film(method, seeds) for (method, of), seeds in runs.items() if of == task]
        if any(shown):
            parts.append(f'<p>{escape(task)}</p><div class="pairs">{"".join(shown)}</div>')
    return "".join(parts)


def _film(method: str, seeds: Sequence[RunRecord]) -> str:
    """The first film of the newest evaluation that has one, of the first such seed, and how that episode went."""
    filmed = ((run, i, films) for run in seeds for i in _iterations(run) if (films := run.films(i)))
    run, iteration, films = next(filmed, (None, 0, []))
    if run is None:
        return ""
    told = f"{method}, {run.folder.name.replace('-', ' ')}, after iteration {iteration}"
    told += f": {words}" if (words := episode_words(run.scores(iteration), 0)) else ""
    return f'<figure><div class="tile">{html_video(films[0])}</div><figcaption>{escape(told)}</figcaption></figure>'


def _iterations(run: RunRecord) -> list[int]:
    """Of its evaluations, the newest first."""
    return [int(row["iteration"]) for row in reversed(run.evals)]


def _links(runs: Sequence[Path], root: Path) -> str:
    """The runs by name, each leading to its report where it has one."""
    items = []
    for run in runs:
        name = os.path.relpath(run, root)
        link = f'<a href="{escape(quote(f"{name}/{REPORT}", safe="/@"))}">{escape(name)}</a>'
        items.append(f"<li>{link if (run / REPORT).exists() else escape(name)}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""
