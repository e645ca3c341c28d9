"""The page of a suite: performance profiles, probabilities of improvement, its tables, and every run's own report.

Profiles and improvements are drawn as in Agarwal et al. 2021 (arXiv:2108.13264): shares of runs above a score with
pointwise bands, and for each pair of methods a point with its interval beside one half.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlflow.files import write_text
from rlflow.report import page
from rlflow.report.curves import COLORS, STYLE
from rlflow.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
            _draw_improvements(ax, methods, pairs)
    return figure


def _draw_profiles(ax: Axes, values: Mapping[str, Any]) -> None:
    for i, (name, found) in enumerate(values["methods"].items()):
        ax.plot(values["thresholds"], found["profile"], color=COLORS[i % 8], label=name)
        if found["band"] is not None:
            ax.fill_between(values["thresholds"], *found["band"], color=COLORS[i % 8], alpha=0.15, linewidth=0)
    ax.set(title="Performance profiles", xlabel="score", ylabel="share of runs above it", ylim=(-0.02, 1.02))
    ax.legend(loc="best", handlelength=1.4, labelspacing=0.3)


def _draw_improvements(ax: Axes, methods: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> None:
    for row, (a, b) in enumerate(pairs):
        middle, low, high = methods[a]["improvement"][b]
        color = COLORS[list(methods).index(a) % 8]
        if low is not None:
            ax.plot([low, high], [row, row], color=color, linewidth=4, alpha=0.3)
        ax.plot([middle], [row], marker="o", color=color)
    ax.axvline(0.5, color="#8A919B", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(pairs)), [f"{a} above {b}" for a, b in pairs])
    ax.set(title="Probability of improvement", xlim=(-0.03, 1.03), ylim=(len(pairs) - 0.5, -0.5))


def suite_page(values: Mapping[str, Any], tables: Sequence[Table], runs: Sequence[Path], out: Path) -> Path:
    """Write the page to `out`, in the folder of the suite: `values` and `tables` are those of `across`."""
    tasks, unfinished = ", ".join(values["tasks"]), ", ".join(values["unfinished"])
    left = (
        f'<p class="soft small">Not summed up, for a task is missing: {escape(unfinished)}.</p>' if unfinished else ""
    )
    many = f"{len(values['scores'])} methods on {len(values['tasks'])} tasks"
    drawn = page.figure(suite_figure(values), "performance profiles and probabilities of improvement")
    parts = [
        f'<div class="kicker">rlflow suite</div><h1>{many}</h1><p class="soft small">{escape(tasks)}</p>{left}',
        page.section("Over all tasks", drawn if values["methods"] else "", _NOTE),
        *(page.section(table.title, table.html()) for table in tables),
        page.section("Runs", _links(runs, out.parent), "Curves, films and settings of each."),
    ]
    write_text(out, page.page("rlflow suite", parts))
    return out


_NOTE = (
    "Scores from 0 to 1 of each task's own scale. Bands and bars are 95 % intervals of the stratified bootstrap: seeds "
    "are drawn inside each task, tasks are not. A curve that lies above another everywhere is of the better method."
)


def _links(runs: Sequence[Path], root: Path) -> str:
    names = [os.path.relpath(run, root) for run in runs]
    linked = (f'<li><a href="{escape(name)}/report.html">{escape(name)}</a></li>' for name in names)
    return f"<ul>{''.join(linked)}</ul>" if names else ""
