"""MLP velocity field for vector observations and small actions (robots, toys)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.functional import softplus

from rlflow.flow.field import VelocityField
from rlflow.models.normalizer import Normalizer
from rlflow.ranges import Size
from rlflow.types import Cond, Tree


def mlp(sizes: Sequence[int], activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Linear layers of the given sizes with activations between them."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(a, b)] + ([activation()] if i < len(sizes) - 2 else [])
    return nn.Sequential(*layers)


def side_by_side(obs: Tree) -> Tensor:
    """Observations (N, F), or a dict of tensors (N, ...) concatenated in the order of its sorted keys."""
    if not isinstance(obs, dict):
        return obs
    entries = [obs[name] for name in sorted(obs)]
    return torch.cat([v.flatten(1) if v.ndim > 1 else v.unsqueeze(1) for v in entries], -1)


class TimeFeatures(nn.Module):
    """Sines and cosines of t in [0, 1] at `width / 2` frequencies from 1/2 to 32 periods."""

    freq: Tensor

    def __init__(self, width: int = 16):
        super().__init__()
        self.register_buffer("freq", math.pi * 2.0 ** torch.linspace(0, 6, width // 2), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """t (N,) to (N, width)."""
        angle = t[:, None] * self.freq.to(t.dtype)
        return torch.cat([angle.sin(), angle.cos()], -1)


class MLPField(VelocityField):
    """v(x, t, dt | obs) with vector observations (N, obs_dim), normalised first.

    `average` reads dt as well; `running` lets `observe` update the normaliser, otherwise it stays as fitted; `spread`
    adds a head that reads the last hidden layer and gives it no gradient, so the velocity is learnt as without it.
    """

    MIN_LOG_SPREAD = -5.0

    def __init__(
        self,
        obs_dim: int,
        event_shape: Sequence[int],
        width: Size = 128,
        depth: Size = 2,
        average: bool = False,
        running: bool = False,
        spread: bool = False,
    ):
        super().__init__()
        self.args = {"obs_dim": obs_dim, "event_shape": list(event_shape), "width": width, "depth": depth}
        self.args |= {"average": average, "running": running} | ({"spread": True} if spread else {})
        self.normalizer, self.running = Normalizer(obs_dim), running
        self.event_shape, self.num_features, self.uses_dt = tuple(event_shape), obs_dim, average
        dim, self.time = math.prod(event_shape), TimeFeatures()
        extra = 16 * (2 if average else 1)
        self.net = mlp([dim + obs_dim + extra, *[width] * depth, dim])
        self.has_spread, self.spread_head = spread, mlp([width, 64, 1] if spread else [])
        if spread:
            nn.init.zeros_(cast(nn.Linear, self.spread_head[-1]).weight)

    def encode(self, obs: Tree) -> Cond:
        """Observations (N, obs_dim), or a dict of tensors concatenated in the order of its sorted keys."""
        return Cond({"pooled": self.normalizer(side_by_side(obs)).to(self.net[0].weight.dtype)})

    def observe(self, obs: Tree) -> None:
        """Let the normaliser, if it is running, see raw observations (N, ...); between two iterations only."""
        if self.running:
            self.normalizer.update(side_by_side(obs))

    def null(self, cond: Cond) -> Cond:
        """Zeros for the normalised observation: an average one."""
        return Cond({"pooled": torch.zeros_like(cond["pooled"])})

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, *D)."""
        return self.net(self.inputs(x, t, dt, cond)).reshape(x.shape)

    def with_spread(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """(N, D + 1); s is at least e^-5, smoothly, and begins near 1."""
        if not self.has_spread:
            return super().with_spread(x, t, dt, cond)
        hidden = self.net[:-1](self.inputs(x, t, dt, cond))
        raw = self.spread_head(hidden.detach())
        return torch.cat([self.net[-1](hidden), self.MIN_LOG_SPREAD + softplus(raw - self.MIN_LOG_SPREAD)], -1)

    def inputs(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """(N, D + F + 16 or 32): what the first layer reads."""
        times = [self.time(t), self.time(dt)] if self.uses_dt else [self.time(t)]
        return torch.cat([x.flatten(1), cond["pooled"], *times], -1)
