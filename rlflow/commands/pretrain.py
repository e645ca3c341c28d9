"""pretrain: make an embedded model."""

from __future__ import annotations

import argparse
from typing import Any

from rlflow.commands.arguments import command


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "pretrain", _run, "Pre-train an embedded model from data the program draws or plays.")
    p.add_argument("world", metavar="NAME", help="shapes, words, robot_bc_hopper, ...")
    p.add_argument("rest", nargs=argparse.REMAINDER, metavar="--steps N --seed N --out DIR ...")


def _run(args: argparse.Namespace) -> None:
    from rlflow.pretrain.worlds import WORLDS
    from rlflow.pretrain.worlds import main as pretrain
    from rlflow.registry import nearest

    if args.world not in WORLDS:
        raise ValueError(f"unknown world {args.world!r}{nearest(args.world, WORLDS)}")
    pretrain(WORLDS[args.world], args.rest)
