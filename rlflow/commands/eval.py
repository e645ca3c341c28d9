"""eval: a run or a checkpoint on held-out prompts or episodes."""

from __future__ import annotations

import argparse
from typing import Any

from rlflow.commands.arguments import (
    asked,
    best_of_flags,
    chosen,
    command,
    json_flag,
    positive,
    trust_flag,
    which_weights,
)
from rlflow.console import print_json
from rlflow.ranges import Seed, argument, filled


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "eval", _run, "Evaluate a run or a checkpoint on held-out prompts, noise off.")
    p.add_argument("source", type=filled, metavar="RUN|CHECKPOINT", help="a folder of either, or shapes / words")
    p.add_argument("--steps", dest="num_steps", type=positive, metavar="K", help="denoising steps")
    p.add_argument("--solver", type=filled, metavar="NAME")
    p.add_argument("--seed", type=argument(Seed), default=None, help="of the initial noise")
    p.add_argument("--num", type=positive, help="number of samples")
    best_of_flags(p)
    which_weights(p)
    trust_flag(p)
    json_flag(p)


def _run(args: argparse.Namespace) -> None:
    from rlflow.deploy.runs import evaluator_of

    evaluator = evaluator_of(args.source, asked(args, chosen(args)))
    result = evaluator()
    means = {f"eval/heldout/{name}": value for name, value in result.means().items()}
    means |= {f"eval/task/{name}": value for name, value in result.by_task().items()}
    if args.json:
        print_json({"samples": len(result), **means})
        return
    how = ", ".join(filter(None, ("deployment sampler", evaluator.select.about)))
    print(f"{result.about}, {how}")
    width = max(28, *(len(name) for name in means))
    for name, value in means.items():
        print(f"  {name:{width}s} {value:.4f}")
