"""compare: several runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlflow.commands.arguments import command, json_flag
from rlflow.console import print_json
from rlflow.ranges import filled


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "compare", _run, "Compare runs: last evaluation, cost, paired differences.")
    p.add_argument("runs", type=filled, nargs="+", metavar="RUN")
    json_flag(p)


def _run(args: argparse.Namespace) -> None:
    from rlflow.report.compare import compare, print_comparison

    result = compare([Path(r) for r in args.runs])
    print_json(result) if args.json else print_comparison(result)
