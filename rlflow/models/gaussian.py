"""A Gaussian actor as a flow of one step: the straight line from the noise to mean(obs), whatever the noise was.

    v(x, t | obs) = (mean(obs) - x) / (1 - t),    so with K = 1 and LearnedNoise   x_1 = mean(obs) + std(obs) eps

The ordinary actor of SAC (Haarnoja et al. 2018), in the same trainer as the flows; deployed, it plays its mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.flow.path import expand
from rlflow.models.mlp import mlp, side_by_side
from rlflow.models.normalizer import Normalizer
from rlflow.ranges import Size
from rlflow.types import Cond, Tree


class GaussianField(VelocityField):
    """mean(obs) by a ReLU network; use it with policy.num_steps=1 and policy.kernel=learned_noise."""

    forgets_start = True

    def __init__(
        self, obs_dim: int, event_shape: Sequence[int], width: Size = 256, depth: Size = 2, running: bool = False
    ):
        super().__init__()
        self.args = {"obs_dim": obs_dim, "event_shape": list(event_shape), "width": width, "depth": depth}
        self.args |= {"running": running}
        self.event_shape, self.num_features, self.running = tuple(event_shape), obs_dim, running
        self.normalizer = Normalizer(obs_dim)
        self.mean = mlp([obs_dim, *[width] * depth, math.prod(event_shape)], nn.ReLU)

    def encode(self, obs: Tree) -> Cond:
        """Observations (N, obs_dim), or a dict of tensors concatenated in the order of its sorted keys."""
        return Cond({"pooled": self.normalizer(side_by_side(obs)).to(self.mean[0].weight.dtype)})

    def observe(self, obs: Tree) -> None:
        """Let the normaliser, if it is running, see raw observations (N, ...)."""
        if self.running:
            self.normalizer.update(side_by_side(obs))

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, *D)."""
        return (self.mean(cond["pooled"]).reshape(x.shape) - x) / expand(1 - t, x)
