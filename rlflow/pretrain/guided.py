"""Guided Flows for decisions: a policy cloned from data of mixed quality, that is told the return still to be earned.

The target alone is dropped from some rows, so guidance (`policy.guidance: {name: cfg, scale: w}`) knows what tells it
from no target; w = 0 is plain cloning, w = 1 conditional cloning. It is judged by what it earns when it is asked for
five returns. The control learns from targets that are dealt to other steps (`--permute`): it cannot follow them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rlflow.envs.base import VecEnv
from rlflow.envs.demos.dataset import Chunks, Demos
from rlflow.envs.targets import rank_correlation
from rlflow.flow.field import VelocityField
from rlflow.flow.guidance import CFG
from rlflow.models.goals.returns import TARGET, ReturnField
from rlflow.models.mlp import side_by_side
from rlflow.pretrain.cloning import STEPS, Cloning, demos_of, play_once
from rlflow.types import Tree

NUM_TARGETS = 5
SCALES = (0.0, 1.0, 1.5, 3.0)
"""Guidance that a policy is judged with: of no target, as learnt, and beyond."""


@dataclass(frozen=True)
class Told(Chunks):
    """Chunks whose observation has the return to go, dealt to other chunks at random where `permute`."""

    targets: Tensor  # (n,) of all steps of the folder

    def __getitem__(self, index: Tensor) -> tuple[Tree, Tensor]:
        """As Chunks, with the entry "target" (N, 1)."""
        obs, action = super().__getitem__(index)
        seen = obs if isinstance(obs, dict) else {"obs": obs}
        return {**seen, TARGET: self.targets[self.starts[index]].unsqueeze(1)}, action


@dataclass(frozen=True)
class GuidedCloning(Cloning):
    """Clones chunks of actions given the observation and the return to go."""

    drop: float = 0.25
    judged: int = 16 * NUM_TARGETS
    permute: bool = False

    @property
    def asset(self) -> str:
        """Its folder."""
        return f"{self.env}_guided"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Of data of mixed quality."""
        super().add_options(parser)
        parser.set_defaults(demos=f"demos/{self.env}_mixed")
        parser.add_argument("--permute", action="store_true", help="the control: targets of other steps")

    def make(self, out: Path, args: argparse.Namespace) -> dict[str, Any]:
        """As any, of demonstrations of mixed quality."""
        demos = demos_of(self.env, Path(args.demos), num=self.num_demos, by=f"{self.env}_mixed")
        return replace(self, permute=args.permute).make_of(demos, out, args)

    def options(self, args: argparse.Namespace) -> str:
        return " --permute" if args.permute else ""

    def world(self, demos: Demos, trust_code: bool = False) -> dict[str, Any]:
        """With five returns to ask for, evenly from the lowest tenth of the data's to the highest."""
        returns = torch.tensor([e["return"] for e in demos.episodes])
        targets = torch.linspace(float(returns.quantile(0.1)), float(returns.quantile(0.9)), NUM_TARGETS)
        return super().world(demos, trust_code) | {"targets": [round(t) for t in targets.tolist()]}

    def targets(self, demos: Demos) -> Tensor:
        """(n,) of the steps of the folder."""
        to_go = demos.returns_to_go()
        return to_go[torch.randperm(len(to_go), generator=torch.Generator().manual_seed(0))] if self.permute else to_go

    def chunks(self, demos: Demos) -> Chunks:
        return Told(demos, demos.chunks(self.chunk).starts, self.chunk, self.targets(demos))

    def network(self, demos: Demos) -> tuple[VelocityField, list[Parameter]]:
        """A multilayer perceptron, and no matrix for Muon."""
        obs, to_go = demos.observations(torch.zeros(1, dtype=torch.long)), demos.returns_to_go()
        field = ReturnField(side_by_side(obs).shape[1] + 1, (self.chunk, *demos.action_shape))
        field.fit_normalizer(demos.moments, to_go)
        return field, []

    def judge(self, field: VelocityField, env: VecEnv) -> dict[str, Any]:
        """Mean returns by the five targets that were asked for, and their rank correlation, by guidance."""
        told: dict[str, Any] = {"asked": list(env.targets)}
        for scale in SCALES:
            score = play_once(field if scale == 1 else CFG(field, scale), env, self.num_steps)["return"]
            means = torch.stack([score[env.asked == i].mean() for i in range(len(env.targets))])
            found = {"achieved": [round(m) for m in means.tolist()], "return": round(score.mean().item(), 1)}
            follows = rank_correlation(torch.tensor(env.targets), means)
            told[f"guidance {scale:g}"] = found | {"rank_correlation": round(follows, 2)}
        return told


GUIDED: dict[str, GuidedCloning] = {
    f"robot_guided_{env}": GuidedCloning(f"robot_guided_{env}", env, steps=steps) for env, steps in STEPS.items()
}
