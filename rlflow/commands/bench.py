"""bench: what iterations cost."""

from __future__ import annotations

import argparse
from typing import Any

from rlflow.commands.arguments import command, json_flag
from rlflow.console import print_json

PEERS = ("environments", "sac", "reinflow", "images", "flow_grpo", "files")
"""The keys of rlflow.bench.peers.ROWS, which loads PyTorch."""


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "bench", _run, "Time training iterations against bare network passes, and all beside peers.")
    p.add_argument("what", choices=["t2i", "robot", "actions", "peers", "sizes"])
    p.add_argument("checkpoint", nargs="?", help="actions: the cloned policy that makes them")
    p.add_argument("--eta", type=float, default=0.2, help="actions: of the solver adaptive")
    p.add_argument("--paper", action="store_true", help="robot: the published size too, and a plain loop as its peer")
    p.add_argument("--rows", nargs="+", choices=PEERS, default=PEERS, help="peers: these alone")
    p.add_argument("--repeats", type=int, default=5, help="peers: turns of each")
    json_flag(p)


def _run(args: argparse.Namespace) -> None:
    result = _result(args)
    if args.json:
        print_json(result)
    elif args.what == "peers":
        from rlflow.bench.peers import table

        print(table(result))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")


def _result(args: argparse.Namespace) -> dict[str, Any]:
    if args.what == "peers":
        from rlflow.bench.peers import bench_peers

        return bench_peers(tuple(args.rows), args.repeats)
    if args.what == "actions":
        from rlflow.bench.actions import bench_actions

        if args.checkpoint is None:
            raise ValueError("rlflow bench actions CHECKPOINT: name the policy")
        return bench_actions(args.checkpoint, args.eta)
    if args.what == "sizes":
        from rlflow.bench.sizes import bench_sizes

        return bench_sizes()
    if args.what == "robot":
        from rlflow.bench.robot import bench_robot

        return bench_robot(args.paper)
    from rlflow.bench.images import bench_t2i

    return bench_t2i()
