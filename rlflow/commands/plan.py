"""plan: what a recipe will cost."""

from __future__ import annotations

import argparse
from typing import Any

from rlflow.commands.arguments import command, json_flag, positive, recipe_argument, trust_flag
from rlflow.console import print_json
from rlflow.ranges import filled


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "plan", _run, "Network evaluations, memory and time of a recipe, before it starts.")
    recipe_argument(p)
    p.add_argument(
        "--gpu", type=filled, default="24GB", metavar="24GB|NAME", help="memory of a GPU, or its name, as rtx4090"
    )
    p.add_argument("--gpus", type=positive, default=1, metavar="N", help="processes, a GPU each")
    trust_flag(p)
    json_flag(p)


def _run(args: argparse.Namespace) -> None:
    from rlflow.config import recipes
    from rlflow.cost.estimate import Planner
    from rlflow.cost.gpus import find_gpu
    from rlflow.cost.plan import plan_as_json, print_plan

    gpu, config = find_gpu(args.gpu), recipes.load(args.recipe, args.overrides, args.trust_code)
    planner = Planner(config, args.trust_code)
    print_json(plan_as_json(planner, gpu, args.gpus)) if args.json else print_plan(planner, gpu, args.gpus)
