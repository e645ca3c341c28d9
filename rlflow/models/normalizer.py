"""Observations made alike: (obs - mean) / std clipped to +-10, with the statistics in the checkpoint.

Statistics of demonstrations are fitted once and stay; without demonstrations they are updated between two
iterations, never between recording a probability and scoring it again, or the first ratio would not be 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.flow.path import at_least_float
from rlflow.parallel.moments import merge, no_moments, scale

LIMIT = 10.0


class Normalizer(nn.Module):
    """The identity until something was seen; constant features keep their scale."""

    moments: Tensor

    def __init__(self, num_features: int):
        super().__init__()
        self.register_buffer("moments", no_moments((num_features,)))

    def forward(self, obs: Tensor) -> Tensor:
        """Normalised observations (N, num_features), in at least float32."""
        obs = at_least_float(obs)
        count, mean, _ = self.moments
        limit = torch.where(count > 0, LIMIT, torch.inf).to(obs.dtype)
        scaled = (obs - mean.to(obs.dtype)) / scale(self.moments).to(obs.dtype)
        return scaled.clamp(-limit, limit)

    def fit(self, obs: Tensor) -> None:
        """The statistics of observations (N, num_features), of every process, in place of all earlier ones."""
        self.moments.zero_()
        self.update(obs)

    @torch.no_grad()
    def update(self, obs: Tensor) -> None:
        """Add observations (N, num_features), of every process, to the statistics."""
        counts = torch.ones(len(obs), dtype=torch.bool, device=obs.device)
        self.moments.copy_(merge(self.moments, obs.to(self.moments.device), counts.to(self.moments.device)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves with the network but stays in float64, where a count of 1e8 still counts."""
        moments = self.moments
        super()._apply(fn, recurse)
        self.moments = moments.to(self.moments.device)
        return self
