"""bench: what iterations cost."""

from __future__ import annotations

import argparse
from typing import Any

from rlflow.commands.arguments import command, json_flag
from rlflow.console import print_json


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "bench", _run, "Time training iterations against bare network passes.")
    p.add_argument("what", choices=["t2i", "robot", "off_policy"])
    p.add_argument("--paper", action="store_true", help="robot: the published size too, and a plain loop as its peer")
    json_flag(p)


def _run(args: argparse.Namespace) -> None:
    if args.what == "robot":
        from rlflow.bench.robot import bench_robot

        result = bench_robot(args.paper)
    elif args.what == "off_policy":
        from rlflow.bench.off_policy import bench_off_policy

        result = bench_off_policy()
    else:
        from rlflow.bench.images import bench_t2i

        result = bench_t2i()
    if args.json:
        print_json(result)
        return
    for name, value in result.items():
        print(f"{name}: {value}")
