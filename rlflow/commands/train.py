"""train: fine-tune a policy with a recipe, in one process or several, one seed or several."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from rlflow.commands.arguments import command, positive, recipe_argument, trust_flag
from rlflow.ranges import filled
from rlflow.train.signals import StoppedAtOnce, sigterm_is_ctrl_c


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "train", _run, "Fine-tune a policy with a recipe.")
    recipe_argument(p)
    p.add_argument("--run", type=filled, metavar="DIR", help="run folder (default runs/RECIPE-TIME)")
    p.add_argument("--resume", type=filled, metavar="last|PATH", help="continue the run in --run from a checkpoint")
    p.add_argument("--seeds", metavar="0,1,2", help="one run per seed, in DIR/seed-N")
    p.add_argument("--processes", type=positive, default=1, metavar="N", help="share each iteration among N processes")
    p.add_argument("--quiet", action="store_true", help="no progress display")
    trust_flag(p)


def _run(args: argparse.Namespace) -> None:
    if args.resume and not args.run:
        raise ValueError("--resume needs --run DIR, the folder of the run to continue")
    seeds = None if args.seeds is None else _seeds(args.seeds)
    try:
        with sigterm_is_ctrl_c():
            _train(args, seeds)
    except StoppedAtOnce:
        raise
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("stopped by a signal before the first iteration")


def _train(args: argparse.Namespace, seeds: list[int] | None) -> None:
    if args.processes > 1:
        _train_shared(args)
        return
    from rlflow.parallel import dist

    try:
        if seeds is None:
            _train_one(args, args.run, args.overrides, args.resume)
        else:
            _train_seeds(args, seeds)
    finally:
        dist.stop()  # once: processes that leave the group between two seeds do not find each other again


def _seeds(text: str) -> list[int]:
    """The numbers of "0,1,2", each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise ValueError(f"--seeds {text!r}: write whole numbers with commas between them, each once, as in 0,1,2")
    return [int(word) for word in words]


def _train_seeds(args: argparse.Namespace, seeds: list[int]) -> None:
    """One run after the other; a signal ends all. With --resume last those that have not begun are begun."""
    base = Path(args.run or f"runs/{Path(args.recipe).stem}")
    folders = {seed: base / f"seed-{seed}" for seed in seeds}
    begun = {seed for seed, folder in folders.items() if (folder / "config.yaml").exists()}
    for seed, folder in folders.items():
        resume = None if args.resume == "last" and begun and seed not in begun else args.resume
        if _train_one(args, folder, [*args.overrides, f"train.seed={seed}"], resume):
            return


def _train_shared(args: argparse.Namespace) -> None:
    from rlflow.config import recipes
    from rlflow.parallel import dist
    from rlflow.train.folder import default_run

    recipes.load(args.recipe, args.overrides, args.trust_code)  # an error is said once
    words = args.words if args.run else [*args.words, "--run", str(default_run(args.recipe))]
    dist.launch(args.processes, args.main, [*words, "--processes", "1"])


def _train_one(args: argparse.Namespace, run: Path | str | None, overrides: list[str], resume: str | None) -> bool:
    """Train one run; True when it was interrupted."""
    from rlflow.report.glossary import duration
    from rlflow.report.report import summary
    from rlflow.train.trainer import Trainer

    trainer = Trainer(
        args.recipe, run, overrides=overrides, resume=resume, trust_code=args.trust_code, quiet=args.quiet
    )
    first = os.environ.get("RANK", "0") == "0"
    if first and not args.quiet and (begun_from := trainer.policy.field.unguided.begun_from):
        print(begun_from, flush=True)
    trainer.fit()
    if first:
        state = f"stopped: {trainer.stops.reason}" if trainer.stops.reason else "finished"
        state = "stopped by a signal, resume with --resume last" if trainer.interrupted else state
        spent = f"{trainer.iteration} iterations, {duration(trainer.seconds)} of training"
        print(f"{state}: {spent}; {summary(trainer.run)}")
    return trainer.interrupted
