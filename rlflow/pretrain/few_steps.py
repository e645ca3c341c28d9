"""Policies that know the average velocity over a step, for one or two denoising steps; see average.py."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import Parameter

from rlflow.envs.demos.dataset import Demos
from rlflow.flow.field import VelocityField
from rlflow.flow.matching import MatchingLoss, ShortcutLoss, cfm_loss
from rlflow.models.dit import DiT
from rlflow.models.io import load_field, save_field
from rlflow.pretrain.average import AlphaFlow, AverageLoss, MeanFlow, SplitMeanFlow
from rlflow.pretrain.cloning import STEPS, Cloning
from rlflow.pretrain.images import IMAGES, World, judge_scenes
from rlflow.pretrain.matching import pretrain, report

BOUND = 1.3
"""Of actions, which lie in [-1, 1], where the ends of targets are clamped."""


@dataclass(frozen=True)
class FewStepCloning(Cloning):
    """Trains `averages` and is judged at one and two denoising steps too; `suffix` ends the name of its folder."""

    suffix: str = ""
    averages: MatchingLoss | AverageLoss = cfm_loss

    @property
    def asset(self) -> str:
        """Its folder."""
        return f"{self.env}_{self.suffix}"

    @property
    def loss(self) -> MatchingLoss | AverageLoss:
        """What is minimised."""
        return self.averages

    @property
    def judged_at(self) -> dict[str, int]:
        """The usual number, one and two."""
        return {"": self.num_steps, "_k1": 1, "_k2": 2}

    def network(self, demos: Demos) -> tuple[VelocityField, list[Parameter]]:
        """The usual one, told dt."""
        return self.multilayer(demos, average=True), []


AVERAGES: dict[str, AverageLoss] = {
    "split": SplitMeanFlow(bound=BOUND),
    "mean": MeanFlow(bound=BOUND),
    "alpha": AlphaFlow(bound=BOUND),
}


class MeanFlowCloning(FewStepCloning):
    """Averages of every length, by one of three identities; SplitMeanFlow, without a derivative, is the steadiest."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Which identity."""
        super().add_options(parser)
        parser.add_argument("--averages", choices=AVERAGES, default="split")

    def make(self, out: Path, args: argparse.Namespace) -> dict[str, Any]:
        """As any, with the identity asked for."""
        mine = replace(self, averages=AVERAGES[args.averages])
        return super(MeanFlowCloning, mine).make(out, args)

    def options(self, args: argparse.Namespace) -> str:
        return f" --averages {args.averages}"


def shortcut(env: str, steps: int) -> FewStepCloning:
    """robot_bc_ENV_shortcut."""
    return FewStepCloning(f"robot_bc_{env}_shortcut", env, steps=steps, suffix="shortcut", averages=ShortcutLoss(4))


FEW_STEPS: dict[str, FewStepCloning] = {
    c.name: c
    for c in (
        *(shortcut(env, steps) for env, steps in STEPS.items()),
        *(MeanFlowCloning(f"robot_bc_{env}_meanflow", env, steps=n, suffix="meanflow") for env, n in STEPS.items()),
        MeanFlowCloning("robot_bc_cube_meanflow", "cube_single", steps=1000, chunk=5, suffix="meanflow"),
    )
}


def converted(name: str, average_from: int | None = None) -> DiT:
    """The DiT of a checkpoint whose later half, or blocks from `average_from`, reads the end of a step.

    At dt = 0 it answers as before, bit for bit. ValueError for another network, or one that knows averages already.
    """
    field = load_field(name)
    if not isinstance(field, DiT) or field.uses_dt:
        raise ValueError(f"--from: {name} is no DiT of instantaneous velocities, which alone can be converted")
    args = field.args | {"average_from": field.args["depth"] // 2 if average_from is None else average_from}
    made = DiT(**args)
    made.load_state_dict(field.state_dict())
    return made


@dataclass(frozen=True)
class FewStepImages:
    """A DiT that is converted, then taught averages by SplitMeanFlow on the drawings that it was pre-trained on."""

    name: str
    world: World
    steps: int = 120
    rows: int = 32
    lr: float = 1e-4

    @property
    def asset(self) -> str:
        """Its folder."""
        return self.name

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """What is converted."""
        parser.add_argument("--from", dest="source", default=self.world.name, help="checkpoint to convert")

    def make(self, out: Path, args: argparse.Namespace) -> dict[str, Any]:
        """Convert, teach, judge at one, two and four steps and save; returns config.json's "made_by"."""
        torch.manual_seed(args.seed)
        field, begin = converted(args.source), time.process_time()
        taught = pretrain(
            field,
            self.world.batches(field, np.random.default_rng(args.seed), self.rows),
            steps=args.steps,
            lr=self.lr,
            loss=SplitMeanFlow(bound=BOUND, warm_up=0.0),
            seed=args.seed,
            progress=report(args.steps, every=10),
        )
        made_by: dict[str, Any] = {
            "command": f"rlflow pretrain {self.name} --from {args.source} --steps {args.steps} --seed {args.seed}",
            "seed": args.seed,
            "steps": args.steps,
            "cpu_seconds": round(time.process_time() - begin),
        }
        for k in (1, 2, 4):
            made_by[f"heldout_strict_k{k}"] = round(judge_scenes(taught, num_steps=k)["heldout_strict"], 3)
        save_field(taught, out, made_by, self.world.judged_by | {"policy": {"num_steps": 4}})
        return made_by


SHAPES = FewStepImages("shapes_fewstep", IMAGES["shapes"])
