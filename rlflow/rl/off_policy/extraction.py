"""Two ways from a critic to a flow policy that stays near what the data do, told by a flow cloned from them, v_b.

    FQL   E[ weight |mu(s, z) - flow_b(s, z)|^2 - Q(s, mu(s, z)) ]     mu is one step, flow_b K steps of v_b from one z
    QAM   the law of v_b's chain tilted by exp(scale Q), by Adjoint Matching; a step without noise is to be that of v_b

Flow Q-Learning (Park et al. 2025, arXiv:2502.02538), Q-learning with Adjoint Matching (Li and Levine 2026,
arXiv:2601.14234). Neither sends the gradient of Q back through K steps of the policy that learns.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import Plan, Steps
from rlflow.ranges import NotNegative, Size
from rlflow.rl.learners.adjoint import Adjoint, lean, matching
from rlflow.rl.learners.reward_gradient import Samples
from rlflow.types import Cond

Value = Callable[[Tensor], Tensor]
"""Actions (N, *D), after the squash, to their values (N,), with a graph."""

Plans = tuple[Plan, Plan]
"""Of the policy as it is told to sample, and of the behaviour's deployment."""


class Extraction(ABC):
    """Base of the ways; `told` are numbers for the log."""

    def behaviour(self, policy: FlowPolicy) -> FlowPolicy:
        """v_b, to begin with the policy's own weights."""
        found = copy.deepcopy(policy)
        found.weights.sets.clear()
        return found

    @abstractmethod
    def check(self, policy: FlowPolicy, steps: Steps) -> None:
        """ValueError where the way does not exist for such a policy."""

    @abstractmethod
    def loss(
        self, policy: FlowPolicy, behaviour: FlowPolicy, plans: Plans, cond: Cond, value: Value, noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(losses (N,) with a graph to the policy, told) at `cond`, by noise (K + 1, N, *D) of x_0 and of the steps."""


@dataclass(frozen=True)
class FQL(Extraction):
    """Flow Q-Learning: one step that climbs Q, near where `num_steps` of the cloned flow lead from its noise.

    The distance is a mean over the action's numbers, after the squash; `normalize` divides Q by its mean size.
    """

    weight: NotNegative = 10.0
    num_steps: Size = 10
    normalize: bool = False

    def behaviour(self, policy: FlowPolicy) -> FlowPolicy:
        found = super().behaviour(policy)
        found.num_steps = self.num_steps
        return found

    def check(self, policy: FlowPolicy, steps: Steps) -> None:
        if policy.num_steps != 1 or steps.possible(1):
            raise ValueError("fql acts in one step without noise: use policy.num_steps=1 and steps=none")

    def loss(
        self, policy: FlowPolicy, behaviour: FlowPolicy, plans: Plans, cond: Cond, value: Value, noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            wanted = policy.squash(behaviour.sample(cond, plans[1], x_0=noise[0]).final)
        action = policy.squash(policy.sample(cond, plans[0], x_0=noise[0]).final)
        distance, q = (action - wanted).square().flatten(1).mean(1), value(action)
        size = q.detach().abs().mean() if self.normalize else 1.0
        return self.weight * distance - q / size, {"policy/distance": distance.detach().mean()}


@dataclass(frozen=True)
class QAM(Extraction):
    """Q-learning with Adjoint Matching: the cloned flow's memoryless chain, tilted by exp(scale Q)."""

    scale: NotNegative = 1.0

    def check(self, policy: FlowPolicy, steps: Steps) -> None:
        Adjoint(self.scale).check(policy, steps)

    def loss(
        self, policy: FlowPolicy, behaviour: FlowPolicy, plans: Plans, cond: Cond, value: Value, noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        plan = plans[0]
        with torch.no_grad():
            path = policy.sample(cond, plan, x_0=noise[0], step_noise=noise[1:], keep_path=True).path
        assert path is not None
        ones, noisy = path.new_ones(len(path)), tuple(plan.noisy.tolist())
        samples = Samples(
            behaviour, lambda: cond, lambda x: value(policy.squash(x)), path, plan.t.to(path), noisy, ones, ones
        )
        means, pulls = lean(samples, self.scale)
        live, total = replace(samples, policy=policy), torch.zeros_like(ones)
        for k, has_noise in enumerate(noisy):
            x, t, t_next = path[:, k], samples.time(k), samples.time(k + 1)
            if has_noise:
                total = total + matching(policy.transition(x, t, t_next, cond), means[k], pulls[k])
            else:
                total = total + ((live.mean(k, x) - means[k]) / (t_next - t)[0]).square().flatten(1).mean(1)
        size = pulls[-1].flatten(1).norm(dim=1).mean()
        return total, {"policy/pull": size}
