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
from rlflow.flow.matching import MatchingLoss, Scheduled, ShortcutLoss, cfm_loss
from rlflow.models.dit import DiT
from rlflow.models.io import load_field, save_field
from rlflow.pretrain.average import AlphaFlow, AverageLoss, MeanFlow, SplitMeanFlow, TargetGuidance
from rlflow.pretrain.cloning import STEPS, Cloning
from rlflow.pretrain.dispersive import VARIANTS, Dispersive
from rlflow.pretrain.images import IMAGES, World, judge_scenes
from rlflow.pretrain.matching import pretrain, report

BOUND = 1.3
"""Of actions, which lie in [-1, 1], where the ends of targets are clamped."""


@dataclass(frozen=True)
class FewStepCloning(Cloning):
    """Trains `averages` and is judged at one and two denoising steps too; `suffix` ends the name of its folder."""

    suffix: str = ""
    averages: MatchingLoss | Scheduled = cfm_loss

    @property
    def asset(self) -> str:
        """Its folder."""
        return f"{self.env}_{self.suffix}"

    @property
    def loss(self) -> MatchingLoss | Scheduled:
        """What is minimised."""
        return self.averages

    @property
    def judged_at(self) -> dict[str, int]:
        """The usual number, and one and two where they are fewer."""
        return {"": self.num_steps} | {f"_k{k}": k for k in (1, 2) if k < self.num_steps}

    def network(self, demos: Demos) -> tuple[VelocityField, list[Parameter]]:
        """The usual one, told dt."""
        return self.multilayer(demos, average=True), []


AVERAGES: dict[str, AverageLoss] = {
    "split": SplitMeanFlow(bound=BOUND),
    "mean": MeanFlow(bound=BOUND),
    "alpha": AlphaFlow(bound=BOUND),
}


@dataclass(frozen=True)
class MeanFlowCloning(FewStepCloning):
    """Averages of every length, by one of three identities; SplitMeanFlow, without a derivative, is the steadiest."""

    layers: tuple[str, ...] = ("net.1", "net.3", "net.5")  # that a dispersive loss looks at

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Which identity, and what is added to it."""
        super().add_options(parser)
        parser.add_argument("--averages", choices=AVERAGES, default="split")
        parser.add_argument("--dispersive", choices=VARIANTS, help="push features of different rows apart")
        parser.add_argument("--weight", type=float, default=0.5, help="of the dispersive loss")
        parser.add_argument("--layers", nargs="+", default=list(self.layers), help="submodules that it looks at")
        parser.add_argument("--shuffle", action="store_true", help="its control: features of other rows")
        parser.add_argument("--guidance", type=float, help="scale, learnt inside the target")
        parser.add_argument("--released", action="store_true", help="guidance as MP1's code has it: of nothing")

    def make(self, out: Path, args: argparse.Namespace) -> dict[str, Any]:
        """As any, with the loss asked for."""
        hidden = 0.1 if args.guidance is not None and not args.released else 0.0
        mine = replace(self, averages=self.asked(args), drop=hidden)
        return super(MeanFlowCloning, mine).make(out, args)

    def asked(self, args: argparse.Namespace) -> Scheduled:
        """The loss that options ask for."""
        averages = AVERAGES[args.averages]
        if args.guidance is None and args.released:
            raise ValueError("--released is a kind of guidance: give --guidance its scale")
        if args.dispersive is None and args.shuffle:
            raise ValueError("--shuffle is the control of a dispersive loss: name one by --dispersive")
        if args.guidance is not None:
            averages = replace(averages, guidance=TargetGuidance(args.guidance, released=args.released))
        if args.dispersive is None:
            return averages
        return Dispersive(averages, tuple(args.layers), VARIANTS[args.dispersive], args.weight, args.shuffle)

    def options(self, args: argparse.Namespace) -> str:
        guidance = "" if args.guidance is None else f" --guidance {args.guidance:g}{' --released' * args.released}"
        chosen = f" --averages {args.averages}{guidance}"
        if args.dispersive is None:
            return chosen
        layers = f"--layers {' '.join(args.layers)}{' --shuffle' * args.shuffle}"
        return f"{chosen} --dispersive {args.dispersive} --weight {args.weight:g} {layers}"


class BesideOneStep(Cloning):
    """Matching on few demonstrations, judged at its own number of denoising steps and at one."""

    @property
    def asset(self) -> str:
        """Its folder."""
        return self.demonstrator

    @property
    def judged_at(self) -> dict[str, int]:
        """The usual number and one."""
        return {"": self.num_steps, "_k1": 1}


def shortcut(env: str, steps: int) -> FewStepCloning:
    """robot_bc_ENV_shortcut."""
    return FewStepCloning(f"robot_bc_{env}_shortcut", env, steps=steps, suffix="shortcut", averages=ShortcutLoss(4))


FEW: dict[str, Any] = {"steps": 1500, "chunk": 5, "rows": 128, "average": 0.99, "judged": 500}
FEW |= {"shown_by": "metaworld_few", "hold_out": 11}  # of 110 episodes one of each task
CLOUDS: dict[str, Any] = {"rows": 256, "suffix": "clouds", "layers": ("head.net.1", "head.net.3", "head.net.5")}
FEW_STEPS: dict[str, Cloning] = {
    c.name: c
    for c in (
        *(shortcut(env, steps) for env, steps in STEPS.items()),
        *(MeanFlowCloning(f"robot_bc_{env}_meanflow", env, steps=n, suffix="meanflow") for env, n in STEPS.items()),
        MeanFlowCloning("robot_bc_cube_meanflow", "cube_single", steps=1000, chunk=5, suffix="meanflow"),
        MeanFlowCloning("robot_bc_cube_clouds", "cube_single", steps=1000, chunk=5, shown_by="cube_clouds", **CLOUDS),
        MeanFlowCloning("robot_bc_tabletop_clouds", "tabletop", judged=512, shown_by="tabletop_clouds", **CLOUDS),
        BesideOneStep("robot_bc_metaworld_few", "metaworld", num_steps=10, **FEW),
        MeanFlowCloning("robot_bc_metaworld_meanflow", "metaworld", num_steps=1, suffix="meanflow", **FEW),
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
