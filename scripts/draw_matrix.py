"""Run every combination of the matrix and draw what happened: docs/matrix.png, and docs/matrix.md with the rules.

    python scripts/draw_matrix.py [--jobs N] [--out DIR]

One panel per algorithm and likelihood; in it kernels down, step plans across; in each cell the three advantages across
and the two environments down. About five minutes of one core. Exits with 1 where a combination does not do what
RULES says.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

ROOT = Path(__file__).parents[1]
INK, FAINT, RAN, RAN_DEEP, WRONG = "#262a30", "#6e757e", "#cfeee3", "#009e73", "#e60049"
REFUSED = {1: "#b9bec6", 2: "#e8a33d", 3: "#a78bd0", 4: "#6fa8dc"}
"""Colour of a rule by its number; the rules beside the axes never show."""


@functools.cache
def matrix() -> ModuleType:
    """tests/properties/test_matrix.py, where the axes and the rules are."""
    path = ROOT / "tests" / "properties" / "test_matrix.py"
    spec = importlib.util.spec_from_file_location("matrix", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["matrix"] = module
    spec.loader.exec_module(module)
    return module


def outcome(index: int) -> int:
    """0: ran as it should. n: refused by rule n, as it should. -1: neither."""
    import torch

    torch.set_num_threads(1)
    m = matrix()
    c = m.ALL[index]
    if found := m.check(c):
        print(f"{' '.join(c)}: {found}", file=sys.stderr)
        return -1
    if not m.rules_of(c):
        return 0
    try:
        m.build(c)
    except ValueError as error:
        return m.matching(error)[0]
    return -1


def run_all(jobs: int) -> dict[tuple[str, ...], int]:
    """The outcome of every combination."""
    total, outcomes = len(matrix().ALL), []
    with ProcessPoolExecutor(jobs) as pool:
        for i, result in enumerate(pool.map(outcome, range(total), chunksize=45), 1):
            outcomes.append(result)
            if i % 450 == 0:
                print(f"{i} of {total}", flush=True)
    return dict(zip(map(tuple, matrix().ALL), outcomes, strict=True))


def cell(axes: Axes, x: int, y: int, results: list[list[int]]) -> None:
    """One kernel and plan: 2 x 3 tiles where it ran, one block with the rule's number where it was refused."""
    flat = {r for row in results for r in row}
    one = flat.pop() if len(flat) == 1 else None
    if one is not None and one > 0:
        axes.add_patch(rounded(x, y, REFUSED[one]))
        axes.text(x, y, str(one), ha="center", va="center", fontsize=9, color=INK, weight="bold")
        return
    axes.add_patch(rounded(x, y, RAN if one == 0 else "white"))
    for i, row in enumerate(results):
        for j, result in enumerate(row):
            color = RAN_DEEP if result == 0 else REFUSED.get(result, WRONG)
            axes.add_patch(Rectangle((x - 0.31 + 0.23 * j, y - 0.23 + 0.26 * i), 0.17, 0.2, color=color, lw=0))


def rounded(x: float, y: float, color: str) -> FancyBboxPatch:
    """A block around (x, y)."""
    return FancyBboxPatch(
        (x - 0.36, y - 0.36), 0.72, 0.72, boxstyle="round,pad=0.07,rounding_size=0.14", color=color, lw=0
    )


def panel(axes: Axes, outcomes: dict[tuple[str, ...], int], algorithm: str, likelihood: str) -> None:
    """Kernels down, step plans across."""
    m = matrix()
    for y, kernel in enumerate(m.KERNELS):
        for x, steps in enumerate(m.STEPS):
            rows = [[outcomes[kernel, steps, likelihood, a, algorithm, env] for a in m.ADVANTAGES] for env in m.ENVS]
            cell(axes, x, y, rows)
    axes.set(xlim=(-0.6, len(m.STEPS) - 0.4), ylim=(len(m.KERNELS) - 0.4, -0.6), aspect="equal")
    axes.set_xticks(range(len(m.STEPS)), m.STEPS, rotation=38, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(m.KERNELS)), m.KERNELS)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK, pad=2)
    for side in axes.spines.values():
        side.set_visible(False)


def legend(figure: Figure, outcomes: dict[tuple[str, ...], int]) -> None:
    """What a cell is made of, and the rules that show."""
    m, axes = matrix(), figure.add_axes((0.085, 0.3 / figure.get_figheight(), 0.9, 1.2 / figure.get_figheight()))
    axes.set(xlim=(-0.6, 27), ylim=(2.6, -0.6), aspect="auto")
    axes.axis("off")
    ran = sum(v == 0 for v in outcomes.values())
    cell(axes, 0, 0, [[0] * 3] * 2)
    text = f"runs: {ran:,} of {len(outcomes):,}.  Across: group std, epoch std, GAE.  Down: image toy, robot toy."
    axes.text(0.7, 0, text, va="center", fontsize=10, color=INK)
    for i, (number, color) in enumerate(REFUSED.items()):
        x, y = 16.8 * (i >= 2), (i + 1 if i < 2 else i - 2)
        axes.add_patch(rounded(x, y, color))
        axes.text(x, y, str(number), ha="center", va="center", fontsize=9, color=INK, weight="bold")
        refused = sum(v == number for v in outcomes.values())
        what = m.RULES[number - 1].what.replace("`", "")
        axes.text(x + 0.7, y, f"{what}: {refused}", va="center", fontsize=10, color=INK)


def draw(outcomes: dict[tuple[str, ...], int], path: Path) -> None:
    """The picture: algorithms down, likelihoods across."""
    m = matrix()
    rows, columns = len(m.ALGORITHMS), len(m.LIKELIHOODS)
    below, above = 2.6, 0.9  # inches
    height = below + above + 2.5 * rows
    figure, grid = plt.subplots(rows, columns, figsize=(16.0, height), sharex=True, sharey=True)
    for i, algorithm in enumerate(m.ALGORITHMS):
        for j, likelihood in enumerate(m.LIKELIHOODS):
            panel(grid[i, j], outcomes, algorithm, likelihood)
            if i == 0:
                grid[i, j].set_title(f"likelihood: {likelihood}", fontsize=11.5, color=INK, pad=8)
        grid[i, -1].text(
            1.03,
            0.5,
            algorithm,
            transform=grid[i, -1].transAxes,
            fontsize=11.5,
            color=INK,
            rotation=-90,
            va="center",
            ha="left",
        )
    figure.subplots_adjust(0.095, below / height, 0.965, 1 - above / height, wspace=0.04, hspace=0.09)
    figure.text(0.095, 1 - 0.5 / height, "What can be combined", fontsize=18, color=INK, weight="bold")
    note = "Every combination was run: two optimiser steps, or refused at construction."
    figure.text(0.395, 1 - 0.48 / height, note, fontsize=11.5, color=FAINT)
    legend(figure, outcomes)
    figure.savefig(path, dpi=110, facecolor="white")


def main() -> int:
    """Run, draw, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    outcomes = run_all(args.jobs)
    draw(outcomes, args.out / "matrix.png")
    (args.out / "matrix.md").write_text(matrix().markdown(), encoding="utf-8")
    wrong = sum(v < 0 for v in outcomes.values())
    print(f"{args.out / 'matrix.png'}: {len(outcomes) - wrong} as the rules say, {wrong} not")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
