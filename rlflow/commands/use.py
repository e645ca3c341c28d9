"""Commands that use what was made: eval, sample, list, serve-reward."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlflow.arguments import command, json_flag, positive, trust_flag
from rlflow.console import print_json


def add(commands: Any) -> None:
    """Enter the commands of this file."""
    for one in (_eval, _sample, _list, _serve_reward):
        one(commands)


def _eval(commands: Any) -> None:
    p = command(commands, "eval", _run_eval, "Evaluate a run or a checkpoint on held-out prompts, noise off.")
    p.add_argument("source", metavar="RUN|CHECKPOINT", help="a run folder, a checkpoint folder, or shapes / words")
    p.add_argument("--steps", type=positive, metavar="K", help="denoising steps")
    p.add_argument("--solver", metavar="NAME")
    p.add_argument("--seed", type=int, default=None, help="of the initial noise")
    p.add_argument("--num", type=positive, help="number of samples")
    _which_weights(p)
    trust_flag(p)
    json_flag(p)


def _run_eval(args: argparse.Namespace) -> None:
    from rlflow.train.runs import evaluator_of

    evaluator = evaluator_of(
        args.source,
        num=args.num,
        num_steps=args.steps,
        solver=args.solver,
        seed=args.seed,
        checkpoint=args.checkpoint,
        weights=args.weights,
        trust_code=args.trust_code,
    )
    result = evaluator()
    means = {f"eval/heldout/{name}": value for name, value in result.means().items()}
    means |= {f"eval/task/{name}": value for name, value in result.by_task().items()}
    if args.json:
        print_json({"samples": len(result), **means})
        return
    print(f"{result.about}, deployment sampler")
    width = max(28, *(len(name) for name in means))
    for name, value in means.items():
        print(f"  {name:{width}s} {value:.4f}")


def _sample(commands: Any) -> None:
    p = command(commands, "sample", _run_sample, "Images of a run or a checkpoint, or a film of a robot's episodes.")
    p.add_argument("source", metavar="RUN|CHECKPOINT|PIPELINE", help="PIPELINE: diffusers' folder or hub id")
    p.add_argument("--prompt", action="append", default=[], help="of images; may be repeated")
    p.add_argument("--out", required=True, metavar="x.png|x.mp4")
    p.add_argument("--num", type=positive, default=4, help="images per prompt, or episodes")
    p.add_argument("--steps", type=positive, metavar="K", help="denoising steps")
    p.add_argument("--seed", type=int, default=0)
    _which_weights(p)
    trust_flag(p)


def _which_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", default="last", help="of a run: last, best or an iteration")
    parser.add_argument("--weights", choices=["live", "ema"], help="of a run; default: the ones it evaluates")


def _run_sample(args: argparse.Namespace) -> None:
    from rlflow.train.figures import image_grid
    from rlflow.train.runs import load, sample, world_of

    env = world_of(args.source, args.trust_code)
    if env != "prompt":
        if args.prompt:
            raise ValueError(f"--prompt: {args.source} takes no text, it acts in {env}; leave it out")
        _film(args)
        return
    if not args.prompt:
        raise ValueError(f"{args.source} makes images: say of what, with --prompt")
    if Path(args.out).suffix != ".png":
        raise ValueError(f"{args.out}: {args.source} makes images, name a file that ends in .png")
    policy = load(args.source, checkpoint=args.checkpoint, weights=args.weights, trust_code=args.trust_code)
    prompts = [text for text in args.prompt for _ in range(args.num)]
    images = sample(policy, prompts, seed=args.seed, num_steps=args.steps)
    image_grid(images, prompts, Path(args.out))
    print(f"{len(prompts)} images in {args.out}")


def _film(args: argparse.Namespace) -> None:
    from rlflow.train.runs import film

    episodes = film(
        args.source,
        args.out,
        num=args.num,
        num_steps=args.steps,
        seed=args.seed,
        checkpoint=args.checkpoint,
        weights=args.weights,
        trust_code=args.trust_code,
    )
    for row in range(len(episodes)):
        print(f"episode {row}: " + ", ".join(f"{name} {float(v[row]):,.4g}" for name, v in episodes.scores.items()))
    print(f"{len(episodes)} episodes in {args.out}")


KINDS = {"kernels": "kernel", "solvers": "solver", "grids": "grid", "steps": "steps", "guidance": "guidance"}
KINDS |= {"likelihoods": "likelihood", "advantages": "advantage", "algorithms": "algorithm", "models": "model"}
KINDS |= {"rewards": "reward", "envs": "env", "policies": "policy"}
"""What `rlflow list` knows besides recipes, by kind of component."""


def _list(commands: Any) -> None:
    p = command(commands, "list", _run_list, "What can be named in a recipe.")
    p.add_argument("kind", choices=("recipes", *KINDS))
    json_flag(p)


def _run_list(args: argparse.Namespace) -> None:
    from rlflow.registry import about

    rows = _recipes() if args.kind == "recipes" else about(KINDS[args.kind])
    if args.json:
        print_json(rows)
        return
    width = max(len(name) for name in rows)
    for name, text in rows.items():
        print(f"{name:{width}s}  {text}")


def _recipes() -> dict[str, str]:
    from rlflow import recipes

    return {name: str(recipes.read(name).get("about", "")) for name in recipes.names()}


def _serve_reward(commands: Any) -> None:
    p = command(commands, "serve-reward", _run_serve_reward, "Serve one reward to runs elsewhere (reward remote).")
    p.add_argument("name", metavar="NAME", help="a name of `rlflow list rewards`")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="its settings, e.g. model=FOLDER")
    p.add_argument("--port", type=int, required=True, metavar="P", help="0 takes a free one")
    p.add_argument("--host", default="127.0.0.1", help="default: this machine alone; others need a token")
    p.add_argument("--token-env", default="RLFLOW_REWARD_TOKEN", metavar="NAME", help="variable that holds the token")
    p.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for one batch")
    trust_flag(p)


def _run_serve_reward(args: argparse.Namespace) -> None:
    from rlflow.config import set_value
    from rlflow.rewards.component import check_reward, make_reward
    from rlflow.rewards.serve import serve

    settings: dict[str, Any] = {}
    for assignment in args.overrides:
        set_value(settings, assignment)
    check_reward("reward", args.name, {args.name: settings}, args.trust_code)
    fn = make_reward(args.name, {args.name: settings}, args.trust_code)
    serve(args.name, fn, args.host, args.port, args.token_env, args.timeout)
