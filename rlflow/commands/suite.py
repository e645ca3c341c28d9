"""suite: tasks x methods x seeds, a sweep whose table says so."""

from __future__ import annotations

import argparse
from typing import Any

from rlflow.commands import sweep
from rlflow.commands.arguments import command


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "suite", _run, "Run a table of tasks and methods; sums up over tasks (see docs/cli.md).")
    sweep.arguments(p)


def _run(args: argparse.Namespace) -> None:
    from rlflow.train.table import parse_table, read_table

    if not parse_table(read_table(args.table)).tasks:
        raise ValueError(f"{args.table} is a table of runs, without tasks and methods: rlflow sweep {args.table}")
    sweep.run(args)
