"""compare: several runs, or a whole sweep, side by side."""

from __future__ import annotations

import argparse
from typing import Any

from rlflow.commands.arguments import command, json_flag
from rlflow.console import print_json
from rlflow.ranges import filled


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "compare", _run, "Compare runs or seeds of runs: held-out metrics, cost, paired differences.")
    p.add_argument("runs", type=filled, nargs="+", metavar="RUN|SWEEP", help="run folders, or a folder that holds them")
    p.add_argument("--html", type=filled, metavar="F", help="write all of it as one page")
    p.add_argument("--png", type=filled, metavar="F", help="draw the held-out metrics")
    p.add_argument("--pdf", type=filled, metavar="F", help="the same, for a paper")
    p.add_argument(
        "--x",
        default="iterations",
        help="axis of --png and --pdf: iterations, time, network_rows, samples (images or env steps), or a held-out "
        "metric such as base_distance, which draws what was paid in it for the others",
    )
    p.add_argument("--latex", action="store_true", help="print the tables for a paper")
    json_flag(p)


def _run(args: argparse.Namespace) -> None:
    from rlflow.comparison.report import compare_report, comparison_tables, comparison_values, figure

    if args.json and args.latex:
        raise ValueError("--json and --latex both print to the terminal: choose one")
    files = [figure(args.runs, path, args.x) for path in (args.png, args.pdf) if path]
    files += [compare_report(args.runs, args.html)] if args.html else []
    if args.json:
        print_json(comparison_values(args.runs))
    elif args.latex:
        print("\n\n".join(table.latex() for table in comparison_tables(args.runs)))
    else:
        for table in comparison_tables(args.runs):
            table.print()
        for path in files:
            print(f"Written: {path.resolve()}")
