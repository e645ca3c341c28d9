"""Learning curves (matplotlib, loaded on first use): a panel per metric, seeds as mean and band from lowest to highest.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart. No pyplot: no global state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlflow.report.glossary import HELDOUT, describe, show
from rlflow.report.metrics_file import Array, Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Run = Sequence[Mapping[str, Any]]
Runs = Run | Sequence[Run] | Mapping[str, Sequence[Run]]
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B", "#A6761D")
DASHES = ("-", "--", "-.", ":")
SECONDS, NETWORK_ROWS, SAMPLES = "cost/train_seconds_total", "cost/network_rows_total", "cost/samples_total"
AXES = {"iterations": "iteration", "time": SECONDS, "network_rows": NETWORK_ROWS, "samples": SAMPLES}
"""Horizontal axes by the name that a command gives them; samples are images, or steps of simulators."""
TIMES = ((3 * 3600, 3600, "h"), (180, 60, "min"), (0, 1, "s"))
"""(an axis of at least so many seconds, is divided by, and is in)."""
POINTS = 400  # of a curve at most; more cannot be seen
PANEL = (3.7, 2.5)  # inches, with its margins
MARGINS = (0.72, 0.12, 0.5, 0.3)  # inches left, right, below and above the axes of a panel
LONGEST = 90  # letters of a name in a legend
SMOOTH_FROM = 40  # points; shorter curves are drawn as they are
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": "#262A30",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#5B626C",
    "axes.edgecolor": "#C4C9D1",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#ECEEF1",
    "xtick.color": "#8A919B",
    "ytick.color": "#8A919B",
    "xtick.labelcolor": "#5B626C",
    "ytick.labelcolor": "#5B626C",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.fonttype": "path",  # the same picture on a machine without the font
    "svg.hashsalt": "rlflow",
}


class Panel(NamedTuple):
    """One or several metrics in one panel; `x` is 'iteration' or a cost/... metric, `x_label` another name for it."""

    title: str
    names: tuple[str, ...]
    x: str = "iteration"
    x_label: str = ""


TOGETHER = (
    Panel("return of held-out episodes", (f"{HELDOUT}return", f"{HELDOUT}train_return")),
    Panel("success", (f"{HELDOUT}success", f"{HELDOUT}train_success", "rollout/success")),
    Panel("length of episodes", (f"{HELDOUT}length", f"{HELDOUT}train_length")),
    Panel("held-out accuracy", (f"{HELDOUT}strict", f"{HELDOUT}soft", f"{HELDOUT}judge")),
    Panel("distances of images", (f"{HELDOUT}diversity", f"{HELDOUT}base_distance")),
)
"""Metrics of one scale in one panel; the last one is no score."""


def heldout_panels(names: Sequence[str]) -> list[Panel]:
    """A panel for every held-out metric of `names`, those of one scale together, the others each in its own."""
    panels = [p._replace(names=kept) for p in TOGETHER if (kept := tuple(n for n in p.names if n in names))]
    shown = {name for panel in panels for name in panel.names}
    own = [name for name in names if name.startswith(HELDOUT) and name not in shown]
    scores = [panel for panel in panels if panel.title != TOGETHER[-1].title]
    return scores + [Panel(describe(name).label, (name,)) for name in own] + panels[len(scores) :]


def curves(
    rows: Runs,
    names: Sequence[str | Panel],
    path: str | Path | None = None,
    *,
    columns: int = 3,
) -> Figure:
    """Learning curves of one run, of several seeds (a list of runs), or of groups of seeds ({label: runs}).

    A run is what `read_metrics` returns. One run is drawn thin with its running mean; seeds as their mean and a
    band from lowest to highest where all have data. `path` ends in .png, .svg or .pdf.
    """
    groups = _groups(rows)
    panels = [Panel(describe(name).label, (name,)) if isinstance(name, str) else name for name in names]
    shown = max(1, min(columns, len(panels)))
    labels = _labels(groups, min(LONGEST, 42 * shown)) if len(groups) > 1 else []
    figure = _panels([(panel, groups) for panel in panels], labels, shown)
    if path is not None:
        save(figure, path)
    return figure


def curves_apart(panels: Sequence[tuple[Panel, Mapping[str, Sequence[Run]]]], *, columns: int = 3) -> Figure:
    """As `curves` of groups of seeds, but each panel has runs of its own: a task each, say.

    Every panel has the same labels in the same order, which are their colours; () where it has no run of one.
    """
    labels = list(panels[0][1])
    return _panels(panels, labels if len(labels) > 1 else [], max(1, min(columns, len(panels))))


def _panels(panels: Sequence[tuple[Panel, Mapping[str, Sequence[Run]]]], labels: Sequence[str], columns: int) -> Figure:
    """`columns` panels beside each other, with what each shows; under them the groups by their `labels`, if any."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    height = math.ceil(len(panels) / columns)
    with mpl.rc_context(STYLE):
        in_a_line = max(1, 56 * columns // max(map(len, labels), default=1))
        under = 0.2 * math.ceil(len(labels) / in_a_line)
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * height + under))
        axes = figure.subplots(height, columns, squeeze=False, gridspec_kw=_places(columns, height, under)).flatten()
        for (panel, groups), ax in zip(panels, axes, strict=False):
            _draw_panel(ax, panel, groups)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        if labels:
            _name_groups(figure, labels, in_a_line)
    return figure


def trade_off(groups: Mapping[str, Sequence[Run]], names: Sequence[str], x: str, path: str | Path) -> Figure:
    """What each group of seeds paid in the metric `x` for each metric of `names`: its evaluations, joined in order.

    A point is the mean over seeds; the last is larger, with the standard deviation over seeds in both directions.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(3, len(names))
    height = math.ceil(len(names) / columns)
    labels = _labels(groups, LONGEST)
    with mpl.rc_context(STYLE):
        in_a_line = max(1, 56 * columns // max(map(len, labels)))
        under = 0.2 * math.ceil(len(labels) / in_a_line)
        figure = Figure(figsize=(1.4 * PANEL[0] * columns, 1.6 * PANEL[1] * height + under), layout="constrained")
        axes = figure.subplots(height, columns, squeeze=False).flatten()
        for ax in axes[len(names) :]:
            ax.set_axis_off()
        for ax, name in zip(axes, names, strict=False):
            for g, runs in enumerate(groups.values()):
                _draw_path(ax, runs, x, name, COLORS[g % 8], "os^D"[g // 8 % 4])
            ax.set(title=describe(name).label, xlabel=describe(x).label, ylabel=describe(name).unit)
        figure.legend(_keys(labels), labels, loc="outside lower left", ncols=in_a_line, handlelength=1.4)
        save(figure, path)
    return figure


def _draw_path(ax: Axes, runs: Sequence[Run], x: str, name: str, color: str, marker: str) -> None:
    """One group: the iterations after which all its seeds were evaluated."""
    points = [_evaluated(Metrics.of(run), x, name) for run in runs]
    iterations = sorted(set.intersection(*(set(found) for found in points))) if points else []
    if not iterations:
        return
    values = np.array([[found[i] for i in iterations] for found in points]).transpose(0, 2, 1)
    xs, ys = values.mean(0)
    ax.plot(xs, ys, color=color, linewidth=1.0, alpha=0.6, marker=marker, markersize=2.5)
    x_sd, y_sd = values[..., -1].std(0, ddof=1) if len(values) > 1 else (0.0, 0.0)
    ax.errorbar(xs[-1], ys[-1], y_sd or None, x_sd or None, color=color, marker=marker, markersize=6, capsize=2)


def _evaluated(table: Metrics, x: str, name: str) -> dict[float, tuple[float, float]]:
    columns = np.stack([table.column("iteration"), table.column(x), table.column(name)])
    return {i: (at, value) for i, at, value in columns[:, np.isfinite(columns).all(0)].T.tolist()}


def _places(columns: int, height: int, under: float) -> dict[str, float]:
    """Where panels stand, from margins in inches: a layout engine measures every letter, three times the time."""
    (width, tall), (left, right, bottom, top) = PANEL, MARGINS
    wide, high = width * columns, tall * height + under
    inside = {"left": left / wide, "right": 1 - right / wide, "bottom": (bottom + under) / high, "top": 1 - top / high}
    space = {"wspace": (left + right) / (width - left - right), "hspace": (bottom + top) / (tall - bottom - top)}
    return inside | space


def save(figure: Figure, path: Any, kind: str | None = None) -> None:
    """Write a figure to a path or an open binary file."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure.savefig(path, format=kind, dpi=160, metadata={"Date": None} if _is_svg(path, kind) else None)


def series(run: Run, name: str, x: str = "iteration") -> tuple[Array, Array]:
    """(x, value) of the rows that have a finite value of `name`; a cost missing there is the last one known."""
    table = Metrics.of(run)
    costs, values = table.column(x), table.column(name)
    latest = np.maximum.accumulate(np.where(np.isfinite(costs), np.arange(len(table)), -1))
    at = np.where(latest < 0, 0.0, costs[latest]) if len(table) else costs
    kept = np.isfinite(values)
    return at[kept], values[kept]


def _is_svg(path: Any, kind: str | None) -> bool:
    return kind == "svg" or (kind is None and str(path).endswith(".svg"))


def _groups(rows: Any) -> dict[str, list[Run]]:
    if isinstance(rows, Mapping):
        return {label: list(runs) for label, runs in rows.items()}
    one_run = not rows or isinstance(rows[0], Mapping)
    return {"": [rows] if one_run else list(rows)}


def _draw_panel(ax: Axes, panel: Panel, groups: Mapping[str, Sequence[Run]]) -> None:
    from matplotlib.ticker import MaxNLocator

    found: dict[tuple[int, int], list[tuple[Array, Array]]] = {}
    for g, runs in enumerate(groups.values()):
        for n, name in enumerate(panel.names):
            lines = [series(run, name, panel.x) for run in runs]
            found[g, n] = [(xs, ys) for xs, ys in lines if len(ys)]
    factor = _name_axis(ax, panel, max((xs[-1] for lines in found.values() for xs, _ in lines), default=0.0))
    named: set[int] = set()
    for (g, n), raw in found.items():
        lines = [(xs / factor, ys) for xs, ys in raw]
        text = describe(panel.names[n]).label if len(panel.names) > 1 and n not in named else ""
        named |= {n} if lines else set()
        color, dash = (COLORS[g % 8], DASHES[n % 4]) if len(groups) > 1 else (COLORS[n % 8], "-")
        if len(lines) == 1:
            _draw_run(ax, *lines[0], color, dash, text)
        elif lines:
            _draw_seeds(ax, lines, color, dash, text)
    drawn = [ys for lines in found.values() for _, ys in lines]
    ax.set_title(panel.title)
    ax.set_ylabel(describe(panel.names[0]).unit)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    if drawn and max(abs(ys).max() for ys in drawn) < 1e-3:
        ax.yaxis.set_major_formatter("{x:.2g}")
    if len(panel.names) > 1 and drawn:
        ax.legend(loc="best", handlelength=1.4, labelspacing=0.3)
    _explain(ax, drawn)


def _name_axis(ax: Axes, panel: Panel, end: float) -> float:
    """Label and ticks of the horizontal axis up to `end`; returns what its values are divided by."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    label, factor = panel.x_label or describe(panel.x).label, 1.0
    if panel.x == SECONDS:
        factor, unit = next((divisor, unit) for least, divisor, unit in TIMES if end >= least)
        label = f"{label} ({unit})"
    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=panel.x != SECONDS))
    if end / factor >= 1000:  # 20k; of less it would make 40m, milli, where minutes are meant
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    return factor


def _labels(groups: Mapping[str, Sequence[Run]], longest: int) -> list[str]:
    short = [group if len(group) <= longest else group[: longest - 3] + "..." for group in groups]
    seeds = [f" ({len(runs)} seeds)" if len(runs) > 1 else "" for runs in groups.values()]
    return [name + count for name, count in zip(short, seeds, strict=True)]


def _name_groups(figure: Figure, labels: Sequence[str], in_a_line: int) -> None:
    """One legend for all panels, under them."""
    figure.legend(_keys(labels), labels, loc="lower left", ncols=in_a_line, handlelength=1.4, borderaxespad=0.1)


def _keys(labels: Sequence[str]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], color=COLORS[g % 8], marker="os^D"[g // 8 % 4] if g > 7 else "") for g in range(len(labels))]


def _explain(ax: Axes, drawn: Sequence[Array]) -> None:
    """Say so where there is nothing to see."""
    values = np.concatenate(drawn) if drawn else np.zeros(0)
    if not len(values):
        text = "no data"
    elif len(values) > 1 and values.min() == values.max():
        text = f"{show(float(values[0]))} throughout"
    else:
        return
    ax.text(0.5, 0.62, text, transform=ax.transAxes, ha="center", color="#8A919B")
    ax.set_yticks([])


def _draw_run(ax: Axes, xs: Array, ys: Array, color: str, dash: str, label: str) -> None:
    """One run: its points where they are few, else a thin line and its running mean."""
    if len(xs) < SMOOTH_FROM:
        ax.plot(xs, ys, dash, color=color, label=label, marker="o" if len(xs) < 15 else None, markersize=3.5)
        return
    xs, ys = _thin(xs, ys)
    ax.plot(xs, ys, color=color, linewidth=0.7, alpha=0.35)
    ax.plot(xs, _running_mean(ys), dash, color=color, label=label)


def _draw_seeds(ax: Axes, lines: Sequence[tuple[Array, Array]], color: str, dash: str, label: str) -> None:
    """Several seeds: mean and band where all have data, every seed faint over all it has."""
    smooth = [(xs, _running_mean(ys) if len(ys) >= SMOOTH_FROM else ys) for xs, ys in (_thin(*line) for line in lines)]
    start, end = max(xs[0] for xs, _ in smooth), min(xs[-1] for xs, _ in smooth)
    grid = np.unique(np.concatenate([xs for xs, _ in smooth]))
    grid = grid[(grid >= start) & (grid <= end)]
    for xs, ys in smooth:
        ax.plot(xs, ys, color=color, linewidth=0.7, alpha=0.3)
    if not len(grid):
        return
    values = np.stack([np.interp(grid, xs, ys) for xs, ys in smooth])
    ax.fill_between(grid, values.min(0), values.max(0), color=color, alpha=0.16, linewidth=0)
    few = "o" if len(grid) < 15 else None
    ax.plot(
        grid,
        values.mean(0),
        dash,
        color=color,
        label=label,
        marker=few,
        markersize=3.5,
    )


def _thin(xs: Array, ys: Array) -> tuple[Array, Array]:
    """At most 400 points, each the mean of its neighbours."""
    if len(xs) <= POINTS:
        return xs, ys
    edges = np.linspace(0, len(xs), POINTS + 1).astype(int)[:-1]
    counts = np.diff([*edges, len(xs)])
    return np.add.reduceat(xs, edges) / counts, np.add.reduceat(ys, edges) / counts


def _running_mean(ys: Array) -> Array:
    """Centred mean over a tenth of the curve; fewer points at its ends."""
    window = np.ones(max(3, len(ys) // 10) | 1)
    return np.convolve(ys, window, "same") / np.convolve(np.ones_like(ys), window, "same")
