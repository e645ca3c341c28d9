"""Velocity field for camera pictures: a small convolutional encoder, then the network of MLPField.

Pictures stay uint8 until the encoder; the features it makes of them are the condition, made once per observation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.models.mlp import MLPField, side_by_side
from rlflow.models.normalizer import Normalizer
from rlflow.ranges import Size
from rlflow.types import Cond, Tree


class Encoder(nn.Sequential):
    """Pixels (N, C, H, W) in [-1, 1] to features (N, F); every layer but the last halves the side."""

    def __init__(self, channels: int, side: int, num_features: int, widths: Sequence[int] = (32, 64, 64, 64)):
        layers: list[nn.Module] = []
        for a, b in zip([channels, *widths], widths, strict=False):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
            side = (side + 1) // 2
        super().__init__(
            *layers, nn.Flatten(), nn.Linear(widths[-1] * side**2, num_features), nn.LayerNorm(num_features)
        )


class PixelField(VelocityField):
    """v(x, t, dt | pixels, state): observations are uint8 pixels, or a dict of those and vectors.

    `pixels` is the shape of the picture under the name `camera`, (H, W, C) unless `channels_first`; `state_dim`
    counts the numbers of the other entries, normalised and taken in the order of their sorted names; `running` lets
    `observe` update their normaliser. With `frozen` the encoder does not train and its features are kept for the
    updates.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        pixels: Sequence[int] = (96, 96, 3),
        state_dim: int = 0,
        channels_first: bool = False,
        encoding: Size = 128,
        width: Size = 256,
        depth: Size = 2,
        average: bool = False,
        frozen: bool = False,
        camera: str = "pixels",
        running: bool = False,
    ):
        super().__init__()
        self.args = {"event_shape": list(event_shape), "pixels": list(pixels), "state_dim": state_dim}
        self.args |= {"channels_first": channels_first, "encoding": encoding, "width": width, "depth": depth}
        self.args |= {"average": average, "frozen": frozen, "camera": camera, "running": running}
        channels, height, across = pixels if channels_first else (pixels[2], *pixels[:2])
        if height != across:
            raise ValueError(f"PixelField reads square pictures, got {height} x {across}: crop or pad them")
        self.channels_first, self.shape, self.state_dim = channels_first, tuple(pixels), state_dim
        self.camera, self.running, self.normalizer = camera, running, Normalizer(state_dim)
        self.encoder = Encoder(channels, height, encoding).requires_grad_(not frozen)
        self.head = MLPField(encoding + state_dim, event_shape, width, depth, average)
        self.event_shape, self.num_features, self.uses_dt = tuple(event_shape), encoding + state_dim, average

    def encoder_parameters(self) -> list[nn.Parameter]:
        """The convolutions."""
        return list(self.encoder.parameters())

    def observe(self, obs: Tree) -> None:
        """Let the normaliser of the state, if it is running, see raw observations (N, ...); between iterations only."""
        if self.running and self.state_dim:
            self.normalizer.update(self._state(obs))

    def encode(self, obs: Tree) -> Cond:
        """Features of the pixels beside the state, as "pooled" (N, F)."""
        pixels = obs[self.camera] if isinstance(obs, dict) else obs
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != self.shape:
            raise ValueError(f"pixels must be uint8 (N, *{self.shape}), got {pixels.dtype} {tuple(pixels.shape)}")
        pictures = pixels if self.channels_first else pixels.permute(0, 3, 1, 2)
        features = self.encoder(pictures.to(next(self.encoder.parameters()).dtype) / 127.5 - 1)
        if not self.state_dim:
            return self.head.encode(features)
        return self.head.encode(torch.cat([features, self.normalizer(self._state(obs)).to(features.dtype)], -1))

    def _state(self, obs: Tree) -> Tensor:
        """Numbers beside the picture (N, state_dim)."""
        return side_by_side({name: value for name, value in obs.items() if name != self.camera})

    def null(self, cond: Cond) -> Cond:
        """Zeros for what is observed."""
        return self.head.null(cond)

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, *D)."""
        return self.head(x, t, dt, cond)
