"""report: write a run's report again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlflow.commands.arguments import command
from rlflow.ranges import filled


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "report", _run, "Write RUN/report.html again.")
    p.add_argument("run", type=filled, metavar="RUN")


def _run(args: argparse.Namespace) -> None:
    from rlflow.report.report import write_report

    print(f"Report: {write_report(Path(args.run)).resolve()}")
