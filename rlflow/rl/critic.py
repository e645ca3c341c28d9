"""Critic: value of an observation from the policy's condition features."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from rlflow.models.mlp import mlp
from rlflow.types import Cond


class Critic(nn.Module):
    """V(obs) = MLP(LayerNorm(pooled features)); features are detached, so the critic trains only itself."""

    def __init__(self, num_features: int, width: int = 128, depth: int = 2):
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.net = mlp([num_features, *[width] * depth, 1])

    def forward(self, cond: Cond) -> Tensor:
        """(N,)."""
        features = cond["pooled"].detach().to(self.norm.weight.dtype)
        return self.net(self.norm(features)).squeeze(-1)
