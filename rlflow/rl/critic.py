"""Critic: value of an observation from the policy's condition features, and the learner that fits it to returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.functional import silu

from rlflow.flow.policy import FlowPolicy
from rlflow.models.mlp import mlp
from rlflow.parallel import dist
from rlflow.rl.advantages import moments
from rlflow.rl.masked import weighted_sum
from rlflow.rl.optim import AdamW, Optimizer
from rlflow.rl.recorded import Recorded
from rlflow.types import Cond, Rollout, tree_map

CondOf = Callable[[Tensor], Cond]


class Critic(nn.Module):
    """V(obs) = MLP(pooled features); features are detached, so the critic trains only itself.

    The norm stands behind the first layer: over a few raw features it would hide their mean and their length.
    """

    def __init__(self, num_features: int, width: int = 128, depth: int = 2):
        super().__init__()
        self.first = nn.Linear(num_features, width)
        self.norm = nn.LayerNorm(width)
        self.net = mlp([*[width] * depth, 1])

    def forward(self, cond: Cond) -> Tensor:
        """(N,)."""
        features = cond["pooled"].detach().to(self.norm.weight.dtype)
        return self.net(silu(self.norm(self.first(features)))).squeeze(-1)


class CriticLearner:
    """A Critic, its optimiser, and what an update asks of it; `steps` optimiser steps per minibatch."""

    def __init__(self, policy: FlowPolicy, *, lr: float = 1e-3, steps: int = 1, width: int = 128):
        self.policy, self.steps = policy, steps
        self.net = Critic(policy.field.num_features, width).to(policy.device, policy.dtype)
        self.optimizer = Optimizer(list(self.net.parameters()), AdamW(lr=lr))
        self._recorded = Recorded(self.gradients, policy, self.optimizer.parameters)

    @torch.no_grad()
    def values(self, rollout: Rollout, cond: CondOf, rows_per_call: int) -> tuple[Tensor, Tensor]:
        """V(obs) and V(next state truly reached), (T, B) each; only ended rows have their final_obs encoded."""
        every = torch.arange(rollout.num_rows, device=self.policy.device)
        v = torch.cat([self.net(cond(rows)) for rows in every.split(rows_per_call)]).view(rollout.reward.shape)
        v_next = torch.cat([v[1:], self.net(self.policy.encode(rollout.last_obs)).unsqueeze(0)])
        if rollout.final_obs is None:
            return v, v_next
        ended = (rollout.truncated | rollout.terminated).flatten().nonzero()[:, 0]
        final, flat = rollout.flat(rollout.final_obs), v_next.flatten()
        for rows in ended.split(rows_per_call) if len(ended) else ():
            flat[rows] = self.net(self.policy.encode(tree_map(lambda x: x[rows], final)))  # noqa: B023 - used at once
        return v, flat.view_as(v)

    def fit(self, cond: Cond, returns: Tensor, weight: Tensor) -> Tensor:
        """Steps towards returns (M,) at `cond`, weights (M,); gives this rank's share of the mean loss before them."""
        total = dist.all_sum(weight.sum()).clamp(min=1.0)
        first, pooled = returns.new_zeros(()), cond["pooled"]
        for step in range(self.steps):
            gradients, loss = self._recorded(pooled, returns, weight, total)
            first = loss if step == 0 else first
            for p, gradient in zip(self.optimizer.parameters, gradients, strict=True):
                p.grad = gradient
            self.optimizer.step()
        return first

    def gradients(
        self, pooled: Tensor, returns: Tensor, weight: Tensor, total: Tensor
    ) -> tuple[Sequence[Tensor], Tensor]:
        """(by the weights, this rank's share of the mean loss); recorded."""
        with torch.enable_grad():
            loss = weighted_sum((self.net(Cond({"pooled": pooled})) - returns).square(), weight) / total
            return torch.autograd.grad(loss, self.optimizer.parameters), loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser."""
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


def explained_variance(value: Tensor, returns: Tensor, weight: Tensor) -> float:
    """1 - Var(returns - value) / Var(returns) over all ranks; nan where the returns do not differ."""
    spread, left = moments(returns, weight)[1], moments(returns - value, weight)[1]
    return float(1 - (left / spread).square()) if spread > 0 else float("nan")
