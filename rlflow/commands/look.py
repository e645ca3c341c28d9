"""Commands that look at a recipe or a run: plan, doctor, report, bench."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlflow.arguments import command, json_flag, positive, recipe_argument, trust_flag
from rlflow.console import print_json


def add(commands: Any) -> None:
    """Enter the commands of this file."""
    for one in (_plan, _doctor, _report, _bench):
        one(commands)


def _doctor(commands: Any) -> None:
    p = command(commands, "doctor", _run_doctor, "Check a recipe: ratios, kappa, gradients, resume, cost.")
    recipe_argument(p)
    trust_flag(p)
    json_flag(p)


def _run_doctor(args: argparse.Namespace) -> None:
    from rlflow import recipes
    from rlflow.train.doctor import checks_as_json, doctor, print_checks

    checks = doctor(recipes.load(args.recipe, args.overrides, args.trust_code), args.trust_code)
    print_json(checks_as_json(checks)) if args.json else print_checks(checks)
    if any(check.passed is False for check in checks):
        raise SystemExit(1)


def _plan(commands: Any) -> None:
    p = command(commands, "plan", _run_plan, "Network evaluations, memory and time of a recipe, before it starts.")
    recipe_argument(p)
    p.add_argument("--gpu", default="24GB", metavar="24GB|NAME", help="memory of a GPU, or its name, as rtx4090")
    p.add_argument("--gpus", type=positive, default=1, metavar="N", help="processes, a GPU each")
    trust_flag(p)
    json_flag(p)


def _run_plan(args: argparse.Namespace) -> None:
    from rlflow import recipes
    from rlflow.train.gpus import find_gpu
    from rlflow.train.plan import Planner, plan_as_json, print_plan

    gpu, config = find_gpu(args.gpu), recipes.load(args.recipe, args.overrides, args.trust_code)
    planner = Planner(config, args.trust_code)
    print_json(plan_as_json(planner, gpu, args.gpus)) if args.json else print_plan(planner, gpu, args.gpus)


def _report(commands: Any) -> None:
    p = command(commands, "report", _run_report, "Write RUN/report.html again.")
    p.add_argument("run", metavar="RUN")


def _run_report(args: argparse.Namespace) -> None:
    from rlflow.train.report import write_report

    print(f"Report: {write_report(Path(args.run)).resolve()}")


def _bench(commands: Any) -> None:
    p = command(commands, "bench", _run_bench, "Time training iterations against bare network passes.")
    p.add_argument("what", choices=["t2i", "robot"])
    p.add_argument("--paper", action="store_true", help="robot: the published size too, and a plain loop as its peer")
    json_flag(p)


def _run_bench(args: argparse.Namespace) -> None:
    if args.what == "robot":
        from rlflow.train.bench_robot import bench_robot

        result = bench_robot(args.paper)
    else:
        from rlflow.train.bench import bench_t2i

        result = bench_t2i()
    if args.json:
        print_json(result)
        return
    for name, value in result.items():
        print(f"{name}: {value}")
