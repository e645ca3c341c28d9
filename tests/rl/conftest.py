"""Tiny compositions in float64, and gradients read off before the optimiser."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlflow.envs.simulators.toy import ToyImage, ToyReach
from rlflow.flow.kernels import CPS, Ancestral, ConstantSDE, FlowSDE, Kernel, LearnedNoise
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import AllButLast, Steps
from rlflow.models.mlp import MLPField
from rlflow.rl.advantages import GAE, GroupAdvantage
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.rl.likelihoods.base import Likelihood
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.objectives.base import Objective
from rlflow.rl.objectives.clip import Clip
from rlflow.rl.optim import AdamW
from rlflow.types import Rollout

ENVS = {"image": ToyImage, "reach": ToyReach}


@dataclass
class Parts:
    """One composition, ready to train."""

    policy: FlowPolicy
    env: Any
    groups: Groups
    collector: Collector
    algorithm: PolicyGradient

    def collect(self, iteration: int = 0) -> Rollout:
        return self.collector.collect(iteration)

    def iterate(self, iteration: int) -> dict[str, float]:
        return self.algorithm.update(self.collector.collect(iteration))


def make_kernel(name: str, event_shape: tuple[int, ...]) -> Kernel:
    if name == "learned":
        kernel = LearnedNoise(4, event_shape, std_min=0.1, std_max=0.4, width=8)
        nn.init.normal_(kernel.net[-1].weight, std=0.3)
        return kernel
    return {"flow": FlowSDE(0.7), "constant": ConstantSDE(0.3), "cps": CPS(0.7), "ancestral": Ancestral(0.6)}[name]


def make_parts(
    env: str = "image",
    kernel: str = "flow",
    steps: Steps | None = None,
    likelihood: ChainLikelihood | None = None,
    advantage: GroupAdvantage | GAE | None = None,
    *,
    groups: Groups | None = None,
    num_steps: int = 5,
    dtype: torch.dtype = torch.float64,
    field: nn.Module | None = None,
    solver: Any = None,
    collector: dict[str, Any] | None = None,
    objective: Callable[[Likelihood], Objective] = Clip,
    **algorithm: Any,
) -> Parts:
    """A composition on a toy: 4 groups of 4 rows, 5 denoising steps unless told otherwise; equal calls, equal weights.

    `objective` makes one of the likelihood: a class, or partial(Clip, low=...).
    """
    torch.manual_seed(0)
    kind = ENVS[env]
    groups = groups or Groups(4, 4)
    field = field or MLPField(4, kind.action_shape, width=12)
    policy = FlowPolicy(field, make_kernel(kernel, kind.action_shape), solver, num_steps=num_steps).to(dtype)
    likelihood, steps = likelihood or ChainLikelihood("mean"), steps or AllButLast()
    policy.check_steps(steps)
    world = kind(groups.num_rows)
    settings = {"horizon": world.horizon} | (collector or {})
    walker = Collector(world, policy, likelihood, steps, groups, **settings)
    algorithm = {"optimizer": AdamW(lr=1e-2), "objective": objective(likelihood)} | algorithm
    learner = PolicyGradient(policy, likelihood, advantage or GroupAdvantage(), groups, **algorithm)
    return Parts(policy, world, groups, walker, learner)


@pytest.fixture
def make() -> Callable[..., Parts]:
    """make(env, kernel, steps, likelihood, advantage, ...) -> Parts."""
    return make_parts


def read_gradient(parts: Parts, rollout: Rollout) -> tuple[Tensor, dict[str, float]]:
    """(flat gradient of the first optimiser step, metrics) of an update that leaves the weights alone."""
    seen: list[Tensor] = []
    optimizer = parts.algorithm.optimizer

    def step() -> float:
        from rlflow.parallel import dist

        dist.sum_gradients(optimizer.parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in optimizer.parameters]
        seen.append(torch.cat([g.flatten() for g in grads]))
        return float(seen[-1].norm())

    kept, optimizer.step = optimizer.step, step
    try:
        metrics = parts.algorithm.update(rollout)
    finally:
        optimizer.step = kept
    return seen[0], metrics


@pytest.fixture
def gradient() -> Callable[[Parts, Rollout], tuple[Tensor, dict[str, float]]]:
    """gradient(parts, rollout) -> (flat gradient, metrics)."""
    return read_gradient
