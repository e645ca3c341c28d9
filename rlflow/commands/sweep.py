"""sweep: a table of recipes and seeds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlflow.commands.arguments import command, positive, trust_flag
from rlflow.ranges import filled


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "sweep", run, "Run a table of recipes and seeds; prints the plan and its cost first.")
    arguments(p)


def arguments(p: argparse.ArgumentParser) -> None:
    """What a sweep is told."""
    p.add_argument("table", type=filled, metavar="TABLE", help="a .yaml file, or a name of `rlflow list tables`")
    p.add_argument(
        "--run", type=filled, metavar="DIR", required=True, help="folder of all runs; finished ones are skipped"
    )
    p.add_argument("--jobs", type=positive, default=None, help="processes side by side")
    p.add_argument("--dry", action="store_true", help="print the plan and its cost only")
    trust_flag(p)


def run(args: argparse.Namespace) -> None:
    """Run it."""
    from rlflow.train.sweep import run_sweep

    run_sweep(args.table, Path(args.run), dry=args.dry, jobs=args.jobs, trust_code=args.trust_code)
