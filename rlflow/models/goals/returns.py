"""A policy that is told the return still to be earned (Guided Flows, Zheng et al. 2023; return-conditioned cloning).

Guidance needs a velocity without the target as well: `null` hides the target and keeps the observation, and training
drops the target of some rows, so v_u + w (v_c - v_u) leans towards what tells high returns from usual ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.models.mlp import MLPField, side_by_side
from rlflow.models.normalizer import Normalizer
from rlflow.ranges import Size
from rlflow.types import Cond, Tree

TARGET = "target"
"""The entry of an observation that is the return to go, (N, 1)."""


class ReturnField(VelocityField):
    """v(x, t | obs, target): an MLP over the observation's other numbers, the target and a flag that it is told.

    `obs_dim` counts the target.
    """

    def __init__(self, obs_dim: int, event_shape: Sequence[int], width: Size = 256, depth: Size = 3):
        super().__init__()
        self.args = {"obs_dim": obs_dim, "event_shape": list(event_shape), "width": width, "depth": depth}
        self.normalizer = Normalizer(obs_dim)
        self.net = MLPField(obs_dim + 1, event_shape, width, depth)
        self.event_shape, self.num_features = tuple(event_shape), obs_dim + 1

    def fit_normalizer(self, moments: Tensor, targets: Tensor) -> None:
        """Statistics (3, obs_dim - 1) of the observations' numbers, and the targets (M,) themselves."""
        told = Normalizer(1)
        told.fit(targets.unsqueeze(1))
        self.normalizer.moments.copy_(torch.cat([moments, told.moments], 1))

    def encode(self, obs: Tree) -> Cond:
        """Observations {"target": (N, 1), name: (N, ...)}; ValueError where no target is told."""
        if not isinstance(obs, dict) or TARGET not in obs:
            raise ValueError(f"no {TARGET} is told: set env.targets=[RETURN], or add the entry {TARGET!r} (N, 1)")
        seen = side_by_side({name: value for name, value in obs.items() if name != TARGET})
        scaled = self.normalizer(torch.cat([seen, obs[TARGET].to(seen)], 1))
        flag = torch.ones_like(scaled[:, :1])
        return Cond({"pooled": torch.cat([scaled, flag], 1).to(next(self.net.parameters()).dtype)})

    def null(self, cond: Cond) -> Cond:
        """The same observation without a target: it and its flag are 0."""
        return Cond({"pooled": torch.cat([cond["pooled"][:, :-2], torch.zeros_like(cond["pooled"][:, -2:])], 1)})

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, *D)."""
        return self.net(x, t, dt, cond)
