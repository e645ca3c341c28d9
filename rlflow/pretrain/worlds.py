"""What `rlflow pretrain` makes, by name: images.py, latent_scenes.py, few_steps.py; robots of the other files.

Everything is drawn, or played, by the program itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from rlflow.pretrain.adaptive import ADAPTIVE, SpreadFit
from rlflow.pretrain.cloning import CLONINGS, Cloning
from rlflow.pretrain.few_steps import FEW_STEPS, SHAPES, FewStepImages
from rlflow.pretrain.goals import GOALS
from rlflow.pretrain.guided import GUIDED
from rlflow.pretrain.images import IMAGES, World
from rlflow.pretrain.latent_scenes import LatentScenes
from rlflow.pretrain.plans import PLANS
from rlflow.ranges import Count, Seed, Size, argument, filled

LATENT = {w.name: w for w in (LatentScenes("sd3", 1200), LatentScenes("klein", 1200), LatentScenes("sd15", 3000))}
Maker = World | LatentScenes | Cloning | FewStepImages | SpreadFit
ROBOTS: dict[str, Maker] = {**CLONINGS, **FEW_STEPS, **ADAPTIVE, **GUIDED, **PLANS, **GOALS}
WORLDS: dict[str, Maker] = {**IMAGES, **LATENT, SHAPES.name: SHAPES, **ROBOTS}


def main(world: Maker, argv: list[str] | None = None, out: Path | None = None) -> None:
    """The command line of `rlflow pretrain` and scripts/pretrain_*.py; --out is ./NAME unless `out` is given.

    The shipped checkpoint is written where it ships only by the scripts, which say so.
    """
    parser = argparse.ArgumentParser(description=f"pre-train the embedded model of {world.name}")
    parser.add_argument("--steps", type=argument(Count), default=world.steps)
    parser.add_argument("--seed", type=argument(Seed), default=0)
    parser.add_argument("--out", type=filled, default=str(out or world.asset))
    parser.add_argument("--threads", type=argument(Size), default=1)
    world.add_options(parser)
    args = parser.parse_args(argv)
    folder = Path(args.out)
    if out is None and any((folder / name).exists() for name in ("config.json", "model_index.json")):
        raise FileExistsError(f"{folder} holds a checkpoint: give another --out")
    torch.set_num_threads(args.threads)
    print(json.dumps(world.make(folder, args), indent=1))
