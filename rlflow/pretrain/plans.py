"""Plans cloned: a flow learns which states follow, told the return to go; a second network what was done between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import Parameter

from rlflow.envs.demos.dataset import Chunks, Demos
from rlflow.flow.field import VelocityField
from rlflow.flow.matching import Coupling
from rlflow.models.goals.plans import PlanField
from rlflow.models.mlp import side_by_side
from rlflow.pretrain.cloning import STEPS
from rlflow.pretrain.guided import GuidedCloning, Told
from rlflow.pretrain.matching import learning_rate_factor
from rlflow.types import Tree


@dataclass(frozen=True)
class Plans(Told):
    """What is denoised is the steps (N, H, S) between the states from an observation on; `num` = H + 1."""

    field: PlanField

    def __getitem__(self, index: Tensor) -> tuple[Tree, Tensor]:
        """Observations with targets, and plans (N, H, S)."""
        obs, _ = super().__getitem__(index)
        run = self.starts[index].unsqueeze(1) + torch.arange(self.num)
        states = side_by_side(self.demos.observations(run.flatten())).unflatten(0, run.shape)
        return obs, self.field.steps_between(self.field.normalise(states))


@dataclass(frozen=True)
class PlanCloning(GuidedCloning):
    """Plans of `horizon` states, of which `chunk` actions are carried out."""

    horizon: int = 8
    inverse_steps: int = 2000

    @property
    def asset(self) -> str:
        """Its folder."""
        return f"{self.env}_plans"

    def chunks(self, demos: Demos) -> Chunks:
        field, num = self.network(demos)[0], self.horizon + 1
        return Plans(demos, demos.chunks(num).starts, num, self.targets(demos), cast(PlanField, field))

    def network(self, demos: Demos) -> tuple[VelocityField, list[Parameter]]:
        """A multilayer perceptron of plans and one of inverse dynamics."""
        seen = side_by_side(demos.observations(torch.zeros(1, dtype=torch.long))).shape[1]
        field = PlanField(seen + 1, demos.action_shape, self.horizon, self.chunk)
        field.told.fit_normalizer(demos.moments, demos.returns_to_go())
        field.fit_spread(transitions(field, demos)[0])
        return field, []

    def clone(self, demos: Demos, steps: int, seed: int, coupling: Coupling) -> tuple[VelocityField, float]:
        """The flow first, then the actions between its states."""
        field, loss = super().clone(demos, steps, seed, coupling)
        train, held_out = demos.split()
        error = fit_inverse(cast(PlanField, field), train, held_out, self.inverse_steps, seed)
        print(f"inverse dynamics: error of an action on held-out episodes {error:.3f}", flush=True)
        return field, loss


def transitions(field: PlanField, demos: Demos) -> tuple[Tensor, Tensor]:
    """Normalised states (M, 2, S) that follow each other, and the actions (M, 1, *A) between them."""
    starts = demos.chunks(2).starts
    pair = starts.unsqueeze(1) + torch.arange(2)
    states = side_by_side(demos.observations(pair.flatten())).unflatten(0, pair.shape)
    return field.normalise(states), demos.actions(starts).unsqueeze(1)


def fit_inverse(field: PlanField, train: Demos, held_out: Demos, steps: int, seed: int = 0, rows: int = 512) -> float:
    """Fit the inverse dynamics in place; root mean squared error of a number of an action on held-out episodes."""
    states, action = transitions(field, train)
    optimizer = torch.optim.AdamW(field.inverse.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: learning_rate_factor(i, steps))
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(len(states), (rows,), generator=rng)
        loss = (field.actions_between(states[some]) - action[some]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        states, action = transitions(field, held_out)
        return float((field.actions_between(states) - action).square().mean().sqrt())


PLANS: dict[str, PlanCloning] = {
    f"robot_plan_{env}": PlanCloning(f"robot_plan_{env}", env, steps=steps) for env, steps in STEPS.items()
}
