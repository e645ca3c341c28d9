"""list: what can be named in a recipe."""

from __future__ import annotations

import argparse
import ast
import importlib.util
from pathlib import Path
from typing import Any

from rlflow import registry
from rlflow.commands.arguments import command, json_flag
from rlflow.console import print_json

KINDS = {
    "kernels": "kernel",
    "solvers": "solver",
    "grids": "grid",
    "steps": "steps",
    "guidance": "guidance",
    "selections": "select",
    "scorers": "scorer",
    "steerings": "steering",
    "likelihoods": "likelihood",
    "advantages": "advantage",
    "objectives": "objective",
    "through": "through",
    "extractions": "extraction",
    "ratios": "ratio",
    "algorithms": "algorithm",
    "models": "model",
    "rewards": "reward",
    "envs": "env",
    "policies": "policy",
}
"""What `rlflow list` knows besides recipes and tables, by kind of component."""


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "list", _run, "What can be named in a recipe.")
    p.add_argument("kind", choices=("recipes", "tables", *KINDS))
    json_flag(p)


def _run(args: argparse.Namespace) -> None:
    own = {"recipes": _recipes, "tables": _tables}
    rows = own[args.kind]() if args.kind in own else about(KINDS[args.kind])
    if args.json:
        print_json(rows)
        return
    width = max(len(name) for name in rows)
    for name, text in rows.items():
        print(f"{name:{width}s}  {text}")


def about(kind: str) -> dict[str, str]:
    """What each component of a kind is, in one line; nothing is imported for it."""
    if kind == "policy":
        return dict(registry.TABLE[kind])
    return {name: _first_line(path) for name, path in registry.TABLE[kind].items()}


def _first_line(path: str) -> str:
    """First line of a component's docstring, read from the source."""
    module, _, attribute = path.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").split("\n")[0]
    return ""


def _recipes() -> dict[str, str]:
    from rlflow.config import recipes

    return {name: str(recipes.read(name).get("about", "")) for name in recipes.names()}


def _tables() -> dict[str, str]:
    from rlflow.config import recipes

    lines = {name: file.read_text(encoding="utf-8").split("\n")[0] for name, file in recipes.tables().items()}
    return {name: line.removeprefix("# ").rstrip(":") for name, line in lines.items()}
