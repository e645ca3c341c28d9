"""Squash: what stands between a chain's end x and the action a that the environment and the critic see.

    p(a) = p(x) / |da/dx|,    tanh:  log |da/dx| = sum_d log(1 - tanh(x_d)^2) = 2 sum_d (log 2 - x_d - softplus(-2 x_d))

The chain, its densities and demonstrations live before it (SAC, Haarnoja et al. 2018, appendix C).
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.functional import softplus


class Squash(nn.Module):
    """The identity: actions are what the chain ends in."""

    def forward(self, x: Tensor) -> Tensor:
        """a (N, *D)."""
        return x

    def inverse(self, action: Tensor) -> Tensor:
        """x (N, *D) with forward(x) = action."""
        return action

    def log_det(self, x: Tensor) -> Tensor:
        """log |da/dx| (N,), summed over the event."""
        return x.new_zeros(len(x))


class Tanh(Squash):
    """a = tanh(x), inside (-1, 1)."""

    LIMIT = 0.999
    """Demonstrated actions are pulled this far inside, where the inverse is finite (3.8)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def inverse(self, action: Tensor) -> Tensor:
        """atanh of the action clipped to +-LIMIT."""
        return torch.atanh(action.clamp(-self.LIMIT, self.LIMIT))

    def log_det(self, x: Tensor) -> Tensor:
        return 2 * (math.log(2.0) - x - softplus(-2 * x)).flatten(1).sum(1)


SQUASHES: dict[str, type[Squash]] = {"identity": Squash, "tanh": Tanh}
