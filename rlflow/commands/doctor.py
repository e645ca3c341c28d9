"""doctor: does a recipe do what it says?."""

from __future__ import annotations

import argparse
from typing import Any

from rlflow.commands.arguments import command, json_flag, recipe_argument, trust_flag
from rlflow.console import print_json


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "doctor", _run, "Check a recipe: ratios, kappa, gradients, resume, cost.")
    recipe_argument(p)
    trust_flag(p)
    json_flag(p)


def _run(args: argparse.Namespace) -> None:
    from rlflow.config import recipes
    from rlflow.doctor.doctor import checks_as_json, doctor, print_checks

    checks = doctor(recipes.load(args.recipe, args.overrides, args.trust_code), args.trust_code)
    print_json(checks_as_json(checks)) if args.json else print_checks(checks)
    if any(check.passed is False for check in checks):
        raise SystemExit(1)
