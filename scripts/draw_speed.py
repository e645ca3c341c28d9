"""Draw docs/speed.png, throughput and memory against size, from what `rlflow bench sizes --json` printed.

rlflow bench sizes --json > sizes.json
python scripts/draw_speed.py sizes.json docs/speed.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter


def draw(found: dict, path: Path) -> None:
    """A column for each kind of size: units per CPU second above, MiB that it adds to a process below."""
    kinds = [kind for kind in found if kind != "setting"]
    figure, axes = plt.subplots(2, len(kinds), figsize=(2.4 * len(kinds), 4.4), squeeze=False)
    for column, kind in enumerate(kinds):
        points = found[kind]["points"]
        sizes = [point["size"] for point in points]
        for axis, name, label in zip(axes[:, column], ("rate", "mib"), (found[kind]["unit"], "MiB"), strict=True):
            values = [point[name] for point in points]
            axis.plot(sizes, values, "o-", markersize=3, linewidth=1.2)
            axis.set_xscale("log"), axis.set_ylim(0, 1.12 * max(*values, 1e-9))
            axis.set_xticks([sizes[0], sizes[-1]], [f"{size:,}" for size in (sizes[0], sizes[-1])])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_title(label, fontsize=8, loc="left"), axis.grid(alpha=0.3), axis.tick_params(labelsize=7)
        axes[1, column].set_xlabel(found[kind]["about"], fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.sizes.read_text()), args.out)


if __name__ == "__main__":
    main()
