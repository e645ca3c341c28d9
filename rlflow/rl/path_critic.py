"""Path critic: value of a half-finished sample x_t, from it, its time and the policy's condition features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.functional import silu

from rlflow.flow.policy import FlowPolicy
from rlflow.models.mlp import TimeFeatures, mlp
from rlflow.rl.batch import Batch, Pairs
from rlflow.rl.likelihoods.base import Likelihood
from rlflow.rl.optim import AdamW, Optimizer
from rlflow.types import Cond, Evidence


class PathCritic(nn.Module):
    """V(x_t, t, cond); three strided convolutions read images, anything else is flat. 0 everywhere at first."""

    def __init__(self, event_shape: Sequence[int], num_features: int, width: int = 128):
        super().__init__()
        self.eyes, seen = _eyes(event_shape, width // 2)
        self.time = TimeFeatures(16)
        self.first = nn.Linear(seen + num_features + 16, width)
        self.norm = nn.LayerNorm(width)
        self.net = mlp([width, width, 1])
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x (M, *D), t (M,), M rows of cond to (M,); the features are detached."""
        dtype = self.norm.weight.dtype
        parts = [self.eyes(x.to(dtype)), cond["pooled"].detach().to(dtype), self.time(t.to(dtype))]
        return self.net(silu(self.norm(self.first(torch.cat(parts, -1))))).squeeze(-1)


def _eyes(event_shape: Sequence[int], width: int) -> tuple[nn.Module, int]:
    """What reads x, and how many numbers it gives."""
    if len(event_shape) != 3:
        return nn.Flatten(1), int(torch.Size(event_shape).numel())
    layers: list[nn.Module] = []
    for channels in (event_shape[0], width, width):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(1, width), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(1)), 4 * width


class PathCriticLearner:
    """A PathCritic of a policy, and its optimiser; x_t and t are those of a likelihood's evidence."""

    def __init__(self, policy: FlowPolicy, likelihood: Likelihood, lr: float, width: int):
        self.likelihood = likelihood
        self.net = PathCritic(policy.event_shape, policy.field.num_features, width).to(policy.device, policy.dtype)
        self.optimizer = Optimizer(list(self.net.parameters()), AdamW(lr=lr), "algorithm.objective.critic_lr")

    def of(self, cond: Cond, evidence: Evidence) -> Tensor:
        """V (M, R) at the states of M rows; gradient to the critic alone."""
        x = self.likelihood.states(evidence)
        m, r = evidence.t.shape
        rows = torch.arange(m, device=x.device).repeat_interleave(r)
        return self.net(x.flatten(0, 1), evidence.t.flatten(), cond.index(rows)).view(m, r)

    @torch.no_grad()
    def values(self, batch: Batch, rows_per_call: int = 64) -> Tensor:
        """V (N, R) at every state of a batch."""
        every = torch.arange(len(batch.row_alive), device=batch.row_alive.device)
        parts = every.split(rows_per_call)
        return torch.cat([self.of(batch.cond(rows), batch.evidence_of(Pairs(rows, None))) for rows in parts])

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """One optimiser step down this rank's share of a loss, which is given back."""
        self.optimizer.zero_grad()
        value = loss()
        value.backward()
        self.optimizer.step()
        return value.detach()

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser."""
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
