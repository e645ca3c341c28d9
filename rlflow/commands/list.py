"""list: what can be named in a recipe."""

from __future__ import annotations

import argparse
from typing import Any

from rlflow.commands.arguments import command, json_flag
from rlflow.console import print_json

KINDS = {
    "kernels": "kernel",
    "solvers": "solver",
    "grids": "grid",
    "steps": "steps",
    "guidance": "guidance",
    "likelihoods": "likelihood",
    "advantages": "advantage",
    "objectives": "objective",
    "algorithms": "algorithm",
    "models": "model",
    "rewards": "reward",
    "envs": "env",
    "policies": "policy",
}
"""What `rlflow list` knows besides recipes, by kind of component."""


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "list", _run, "What can be named in a recipe.")
    p.add_argument("kind", choices=("recipes", *KINDS))
    json_flag(p)


def _run(args: argparse.Namespace) -> None:
    from rlflow.registry import about

    rows = _recipes() if args.kind == "recipes" else about(KINDS[args.kind])
    if args.json:
        print_json(rows)
        return
    width = max(len(name) for name in rows)
    for name, text in rows.items():
        print(f"{name:{width}s}  {text}")


def _recipes() -> dict[str, str]:
    from rlflow.config import recipes

    return {name: str(recipes.read(name).get("about", "")) for name in recipes.names()}
