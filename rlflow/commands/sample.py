"""sample: images, videos, or a film of episodes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlflow.commands.arguments import asked, best_of_flags, chosen, command, positive, trust_flag, which_weights
from rlflow.ranges import Seed, argument, filled


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "sample", _run, "Images or videos of a run or a checkpoint, or a film of a robot's episodes.")
    p.add_argument("source", type=filled, metavar="RUN|CHECKPOINT|PIPELINE", help="PIPELINE: diffusers' folder or id")
    p.add_argument("--prompt", action="append", default=[], help="of images; may be repeated")
    p.add_argument("--out", type=filled, required=True, metavar="x.png|x.mp4|x.gif", help="png: of videos a strip each")
    p.add_argument("--num", type=positive, default=4, help="images per prompt, or episodes")
    p.add_argument("--steps", dest="num_steps", type=positive, metavar="K", help="denoising steps")
    p.add_argument("--seed", type=argument(Seed), default=0)
    best_of_flags(p)
    which_weights(p)
    trust_flag(p)


def _run(args: argparse.Namespace) -> None:
    from rlflow.deploy.runs import load, world_of
    from rlflow.deploy.sampling import sample
    from rlflow.report.figures import image_grid
    from rlflow.report.video import FPS, frames_of, strips, write_film

    env = world_of(args.source, args.trust_code)
    if env != "prompt":
        if args.prompt:
            raise ValueError(f"--prompt: {args.source} takes no text, it acts in {env}; leave it out")
        _film(args)
        return
    if not args.prompt:
        raise ValueError(f"{args.source} makes images: say of what, with --prompt")
    out, name_a = Path(args.out), f"{args.out}: {args.source} makes images, name a file that ends in .png"
    if out.suffix not in (".png", ".mp4", ".gif"):
        raise ValueError(name_a)
    policy = load(
        args.source,
        checkpoint=args.checkpoint,
        weights=args.weights,
        select=chosen(args),
        trust_code=args.trust_code,
    )
    if policy.field.frames is None and out.suffix != ".png":
        raise ValueError(name_a)
    prompts = [text for text in args.prompt for _ in range(args.num)]
    images = sample(policy, prompts, seed=args.seed, num_steps=args.num_steps)
    if out.suffix != ".png":
        write_film([frame for video in images for frame in frames_of(video)], out, FPS)
    else:
        image_grid(images if images.ndim == 4 else strips(images), prompts, out)
    print(f"{len(prompts)} {'images' if images.ndim == 4 else 'videos'} in {out}")


def _film(args: argparse.Namespace) -> None:
    from rlflow.deploy.sampling import film

    episodes = film(args.source, args.out, asked(args, chosen(args)))
    for row in range(len(episodes)):
        print(f"episode {row}: " + ", ".join(f"{name} {float(v[row]):,.4g}" for name, v in episodes.scores.items()))
    print(f"{len(episodes)} episodes in {args.out}")
