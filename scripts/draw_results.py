"""Draw docs/results.png from the tables of docs/results.md: what every recipe began with, reached, and its control.

python scripts/draw_results.py
"""

import itertools
import re
from pathlib import Path

import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
COLUMNS = {"before": "#8a8f98", "control": "#c2503c", "after": "#1f7a4d"}


def number(cell: str) -> tuple[float, float] | None:
    """(mean, standard deviation or 0) that a cell begins with; None where it has none."""
    found = re.match(r"\**([\d,]*\.?\d+)\**(?: \+- ([\d,]*\.?\d+))?", cell)
    return (float(found[1].replace(",", "")), float((found[2] or "0").replace(",", ""))) if found else None


def recipes(text: str) -> list[dict[str, str]]:
    """Rows of all of a page's tables that tell what recipes reached, by column."""
    found = []
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        if is_table:
            names, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
            found += [dict(zip(names, row, strict=True)) for row in rows if "after (seeds)" in names]
    return found


def main() -> None:
    """One line a recipe; numbers as shares of what was reached, so that returns and accuracies share an axis."""
    rows = recipes((DOCS / "results.md").read_text(encoding="utf-8"))
    figure, axes = plt.subplots(figsize=(9.5, 0.3 * len(rows) + 1.1), layout="constrained")
    for y, row in enumerate(rows):
        reached = number(row["after (seeds)"])
        assert reached is not None, row
        for column, colour in COLUMNS.items():
            value = reached if column == "after" else number(row[column])
            if value is not None:
                x, bar = (part / reached[0] for part in value)
                axes.errorbar(x, y, xerr=bar or None, fmt="o", color=colour, capsize=3, label=None if y else column)
    labels = [re.sub("[`*]", "", row["system, recipe"]) + "  " + row["task, metric"] for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("share of what was reached (bars: sd over seeds)")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(DOCS / "results.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
