"""Flow-G: a gated velocity, v = sigmoid(gate) * (candidate - x), after the update gate of a GRU (SAC Flow, 2025).

One step of size dt is x' = (1 - dt z) x + dt z candidate with z in (0, 1): an average of where the sample is and
where it could be. So dx'/dx = 1 - dt z + dt (...) stays near or below 1, and a gradient that goes back through all K
steps is not multiplied up, as it may be through K steps of a plain network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.models.mlp import MLPField, mlp
from rlflow.ranges import Size
from rlflow.types import Cond, Tree


class GatedField(VelocityField):
    """Candidate network of MLPField's shape and a gate of the same inputs; the gate starts open at sigmoid(5)."""

    OPEN = 5.0

    def __init__(
        self,
        obs_dim: int,
        event_shape: Sequence[int],
        width: Size = 256,
        depth: Size = 2,
        gate_width: Size = 64,
        running: bool = False,
    ):
        super().__init__()
        self.args = {"obs_dim": obs_dim, "event_shape": list(event_shape), "width": width, "depth": depth}
        self.args |= {"gate_width": gate_width, "running": running}
        self.candidate = MLPField(obs_dim, event_shape, width, depth, running=running)
        self.event_shape, self.num_features = self.candidate.event_shape, self.candidate.num_features
        dim = math.prod(event_shape)
        self.gate = mlp([dim + obs_dim + 16, gate_width, dim])
        last = self.gate[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, self.OPEN)

    def encode(self, obs: Tree) -> Cond:
        """As MLPField."""
        return self.candidate.encode(obs)

    def observe(self, obs: Tree) -> None:
        """As MLPField."""
        self.candidate.observe(obs)

    def null(self, cond: Cond) -> Cond:
        """As MLPField."""
        return self.candidate.null(cond)

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, *D)."""
        inputs = self.candidate.inputs(x, t, dt, cond)
        z = torch.sigmoid(self.gate(inputs)).reshape(x.shape)
        return z * (self.candidate.net(inputs).reshape(x.shape) - x)
