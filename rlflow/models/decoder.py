"""Flow-T: a small decoder whose action tokens attend to observation tokens (SAC Flow, 2025).

Every number observed is a token (value times a learned vector, plus one), every action of the chunk another, with the
time added. A layer is x + cross(norm x, obs), x + self(norm x) where there is more than one action, x + mlp(norm x).
Over a single observation token attention would be a linear map; here there are obs_dim of them. Keys and values of the
observation depend neither on x nor on t: they are made once per observation, whatever K is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

from rlflow.flow.field import VelocityField
from rlflow.models.mlp import TimeFeatures, mlp, side_by_side
from rlflow.models.normalizer import Normalizer
from rlflow.ranges import Size
from rlflow.types import Cond, Tree


def heads_first(x: Tensor, heads: int) -> Tensor:
    """(N, S, W) to (N, heads, S, W / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """Cross-attention, self-attention over the chunk, and a feed-forward network, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, num_tokens: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if num_tokens > 1 else 2))
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.mine = nn.Linear(width, 3 * width) if num_tokens > 1 else None
        self.mine_out = nn.Linear(width, width) if num_tokens > 1 else None
        self.mlp = mlp([width, 2 * width, width], nn.GELU)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Tokens (N, H, W) after the layer; keys and values (N, heads, S, W / heads)."""
        query = heads_first(self.query(self.norms[0](x)), self.heads)
        x = x + self.out(attend(query, keys, values).transpose(1, 2).flatten(2))
        if self.mine is not None and self.mine_out is not None:
            q, k, v = (heads_first(part, self.heads) for part in self.mine(self.norms[1](x)).chunk(3, -1))
            x = x + self.mine_out(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[-1](x))


class DecoderField(VelocityField):
    """v(x, t | obs) of vector observations, for events (H, *A): a token per action of the chunk."""

    def __init__(
        self,
        obs_dim: int,
        event_shape: Sequence[int],
        width: Size = 96,
        depth: Size = 2,
        heads: Size = 4,
        running: bool = False,
    ):
        super().__init__()
        if obs_dim < 2:
            raise ValueError("attention needs more than one observation token: use field=gated or mlp for one number")
        if width % heads:
            raise ValueError(f"heads must divide the width, got {heads} and {width}")
        self.args = {"obs_dim": obs_dim, "event_shape": list(event_shape), "width": width, "depth": depth}
        self.args |= {"heads": heads, "running": running}
        self.event_shape, self.num_features, self.running = tuple(event_shape), obs_dim, running
        self.heads, self.depth, per_action = heads, depth, math.prod(event_shape[1:])
        self.normalizer, self.time = Normalizer(obs_dim), TimeFeatures()
        self.token = nn.Parameter(torch.randn(obs_dim, width) / math.sqrt(width))
        self.place = nn.Parameter(torch.randn(obs_dim, width) / math.sqrt(width))
        self.obs_norm = nn.LayerNorm(width)
        self.keys_values = nn.Linear(width, 2 * width * depth)
        self.action_in, self.time_in = nn.Linear(per_action, width), nn.Linear(16, width)
        self.order = nn.Parameter(torch.randn(event_shape[0], width) / math.sqrt(width))
        self.layers = nn.ModuleList(Layer(width, heads, event_shape[0]) for _ in range(depth))
        self.norm, self.action_out = nn.LayerNorm(width), nn.Linear(width, per_action)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """What makes the keys and values."""
        return [self.token, self.place, *self.obs_norm.parameters(), *self.keys_values.parameters()]

    def encode(self, obs: Tree) -> Cond:
        """Observations (N, obs_dim), or a dict of tensors, to "pooled" and the layers' keys and values."""
        pooled = self.normalizer(side_by_side(obs)).to(self.token.dtype)
        tokens = self.obs_norm(pooled.unsqueeze(-1) * self.token + self.place)
        parts = self.keys_values(tokens).chunk(2 * self.depth, -1)
        named = {f"{i}": heads_first(part, self.heads) for i, part in enumerate(parts)}
        return Cond({"pooled": pooled, **named})

    def observe(self, obs: Tree) -> None:
        """Let the normaliser, if it is running, see raw observations (N, ...)."""
        if self.running:
            self.normalizer.update(side_by_side(obs))

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, *D)."""
        tokens = self.action_in(x.flatten(2)) + self.order + self.time_in(self.time(t)).unsqueeze(1)
        for i, layer in enumerate(self.layers):
            tokens = layer(tokens, cond[f"{2 * i}"], cond[f"{2 * i + 1}"])
        return self.action_out(self.norm(tokens)).reshape(x.shape)
