"""Velocity fields for what a camera sees, pictures or points in space: an encoder, then the network of MLPField.

What the encoder makes is the condition, made once per observation. Pictures stay uint8 until there. A point cloud is a
set, so each point goes through the same small network and the largest of every feature stays (PointNet, Qi et al. 2017;
for policies DP3, Ze et al. 2024): neither the order of the points nor how often one is there matters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.models.mlp import MLPField, mlp, side_by_side
from rlflow.models.normalizer import Normalizer
from rlflow.parallel.moments import pooled
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


class SensedField(VelocityField):
    """v(x, t, dt | what is seen, state): a subclass makes the features (N, encoding) of the entry `sense`.

    `state_dim` counts the numbers of the other entries, normalised and taken in the order of their sorted names;
    `running` lets `observe` update their normaliser. With `frozen` the encoder does not train and its features are kept
    for the updates.
    """

    def __init__(
        self,
        encoder: nn.Module,
        event_shape: Sequence[int],
        sense: str,
        state_dim: int,
        encoding: int,
        width: int,
        depth: int,
        average: bool,
        running: bool,
    ):
        super().__init__()
        self.args = {"event_shape": list(event_shape), "state_dim": state_dim, "encoding": encoding, "width": width}
        self.args |= {"depth": depth, "average": average, "running": running}
        self.sense, self.state_dim, self.running = sense, state_dim, running
        self.normalizer, self.encoder = Normalizer(state_dim), encoder
        self.head = MLPField(encoding + state_dim, event_shape, width, depth, average)
        self.event_shape, self.num_features, self.uses_dt = tuple(event_shape), encoding + state_dim, average

    def features(self, seen: Tensor) -> Tensor:
        """(N, encoding) of what is seen (N, ...)."""
        raise NotImplementedError

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Those of what makes the features."""
        return list(self.encoder.parameters())

    def observe(self, obs: Tree) -> None:
        """Let the normaliser of the state, if it is running, see raw observations (N, ...); between iterations only."""
        if self.running and self.state_dim:
            self.normalizer.update(self._state(obs))

    def encode(self, obs: Tree) -> Cond:
        """Features of what is seen beside the state, as "pooled" (N, F)."""
        features = self.features(self.seen(obs))
        if not self.state_dim:
            return self.head.encode(features)
        return self.head.encode(torch.cat([features, self.normalizer(self._state(obs)).to(features.dtype)], -1))

    def seen(self, obs: Tree) -> Tensor:
        """The entry that is a picture or a cloud, or all of the observation."""
        return obs[self.sense] if isinstance(obs, dict) else obs

    def _state(self, obs: Tree) -> Tensor:
        """Numbers beside it (N, state_dim)."""
        return side_by_side({name: value for name, value in obs.items() if name != self.sense})

    def null(self, cond: Cond) -> Cond:
        """Zeros for what is observed."""
        return self.head.null(cond)

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, *D)."""
        return self.head(x, t, dt, cond)


class PixelField(SensedField):
    """v(x, t, dt | pixels, state): observations are uint8 pixels, or a dict of those and vectors.

    `pixels` is the shape of the picture under the name `camera`, (H, W, C) unless `channels_first`; the rest as in
    SensedField.
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
        channels, height, across = pixels if channels_first else (pixels[2], *pixels[:2])
        if height != across:
            raise ValueError(f"PixelField reads square pictures, got {height} x {across}: crop or pad them")
        encoder = Encoder(channels, height, encoding).requires_grad_(not frozen)
        super().__init__(encoder, event_shape, camera, state_dim, encoding, width, depth, average, running)
        self.args |= {"pixels": list(pixels), "channels_first": channels_first, "frozen": frozen, "camera": camera}
        self.channels_first, self.shape = channels_first, tuple(pixels)

    def features(self, seen: Tensor) -> Tensor:
        """(N, encoding) of pixels (N, H, W, C) or (N, C, H, W)."""
        if seen.dtype != torch.uint8 or tuple(seen.shape[1:]) != self.shape:
            raise ValueError(f"pixels must be uint8 (N, *{self.shape}), got {seen.dtype} {tuple(seen.shape)}")
        pictures = seen if self.channels_first else seen.permute(0, 3, 1, 2)
        return self.encoder(pictures.to(next(self.encoder.parameters()).dtype) / 127.5 - 1)


class PointNet(nn.Module):
    """Points (N, P, C) to features (N, F): one network for all, 64-128-64, the largest of each feature, a LayerNorm."""

    def __init__(self, channels: int, num_features: int, widths: Sequence[int] = (64, 128, 64)):
        super().__init__()
        self.point, self.norm = mlp([channels, *widths, num_features]), nn.LayerNorm(num_features)

    def forward(self, points: Tensor) -> Tensor:
        """(N, F)."""
        return self.norm(self.point(points).amax(1))


class CloudField(SensedField):
    """v(x, t, dt | points, state): observations are points (N, P, 3), or (N, P, 6) with colours, and vectors beside.

    `points` is the shape of a cloud under the name `cloud`, whose channels are normalised over all points; the rest as
    in SensedField. Fewer points than P are filled up by any of them again.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        points: Sequence[int] = (256, 3),
        state_dim: int = 0,
        encoding: Size = 64,
        width: Size = 256,
        depth: Size = 2,
        average: bool = False,
        frozen: bool = False,
        cloud: str = "cloud",
        running: bool = False,
    ):
        encoder = PointNet(points[1], encoding).requires_grad_(not frozen)
        super().__init__(encoder, event_shape, cloud, state_dim, encoding, width, depth, average, running)
        self.args |= {"points": list(points), "frozen": frozen, "cloud": cloud}
        self.shape, self.channels = tuple(points), Normalizer(points[1])

    def observe(self, obs: Tree) -> None:
        """The statistics of the points too."""
        super().observe(obs)
        if self.running:
            self.channels.update(self.seen(obs).flatten(0, 1))

    def fit(self, moments: Tensor, before: int) -> None:
        """Statistics (3, D) of all numbers observed, `before` of which come before the cloud's."""
        end = before + self.shape[0] * self.shape[1]
        self.channels.moments.copy_(pooled(moments[:, before:end].unflatten(1, self.shape)))
        self.normalizer.moments.copy_(torch.cat([moments[:, :before], moments[:, end:]], 1))

    def features(self, seen: Tensor) -> Tensor:
        """(N, encoding) of points (N, P, C)."""
        if not seen.is_floating_point() or tuple(seen.shape[1:]) != self.shape:
            raise ValueError(f"points must be floats (N, *{self.shape}), got {seen.dtype} {tuple(seen.shape)}")
        return self.encoder(self.channels(seen).to(next(self.encoder.parameters()).dtype))
