"""A network from scratch for what a simulator shows: numbers go to an MLP, a picture or cloud through an encoder first.

A picture is a uint8 array of three axes, (H, W, C) or (C, H, W). A cloud is an array of floats (P, 3), or (P, 6) with
colours, of 16 points or more. Everything else observed counts as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from rlflow import registry
from rlflow.flow.field import VelocityField
from rlflow.models.cnn import CloudField, PixelField
from rlflow.models.mlp import MLPField
from rlflow.models.normalizer import Normalizer
from rlflow.ranges import Size
from rlflow.types import Tree

ALONE = "pixels"
"""Name of a picture that is not an entry of a dictionary."""
FEWEST = 16
"""Points of a cloud; a smaller array is taken for numbers."""

TOLD = ("obs_spec", "event_shape", "obs_dim", "pixels", "camera", "channels_first", "points", "cloud", "state_dim")
"""Constructor arguments that follow from the simulator, which a config may not set."""


@dataclass(frozen=True)
class Seen:
    """What one row observes: how many numbers, and the name and shape of the picture, or the cloud, if there is one."""

    numbers: int
    camera: str | None = None
    pixels: tuple[int, ...] = ()
    cloud: str | None = None
    points: tuple[int, ...] = ()
    before: int = 0
    """Numbers of the entries whose names come before the cloud's."""

    @classmethod
    def of(cls, obs_spec: Tree) -> Seen:
        """From meta tensors; ValueError for what no network of ours reads."""
        if obs_spec is None:
            raise ValueError("the environment does not tell what it shows: give it an obs_spec of meta tensors")
        entries = obs_spec if isinstance(obs_spec, dict) else {ALONE: obs_spec}
        if nested := [name for name, entry in entries.items() if isinstance(entry, dict)]:
            raise ValueError(f"the observation nests dictionaries under {nested}: flatten them in the environment")
        cameras = [name for name, entry in entries.items() if _is_picture(entry)]
        clouds = [name for name, entry in entries.items() if _is_cloud(entry)]
        if len(cameras) > 1:
            raise ValueError(f"the observation has pictures {cameras}, and one can be read: stack them into channels")
        if len(clouds) > 1 or (clouds and cameras):
            raise ValueError(f"the observation has {cameras + clouds}, and one picture or cloud can be read")
        sizes = {name: math.prod(entry.shape) for name, entry in entries.items() if name not in cameras + clouds}
        seen = cls(sum(sizes.values()))
        for name in cameras:
            seen = replace(seen, camera=name, pixels=tuple(entries[name].shape))
        for name in clouds:
            before = sum(size for other, size in sizes.items() if other < name)
            seen = replace(seen, cloud=name, points=tuple(entries[name].shape), before=before)
        return seen

    @property
    def channels_first(self) -> bool:
        """True for (C, H, W)."""
        return bool(self.pixels) and self.pixels[1] == self.pixels[2] != self.pixels[0]

    @property
    def shapes(self) -> dict[str, Any]:
        """Constructor arguments that follow from it: of an MLPField, a CloudField or a PixelField."""
        if self.cloud is not None:
            return {"points": self.points, "cloud": self.cloud, "state_dim": self.numbers}
        if self.camera is None:
            return {"obs_dim": self.numbers}
        picture = {"pixels": self.pixels, "camera": self.camera, "channels_first": self.channels_first}
        return picture | {"state_dim": self.numbers}


def _is_picture(entry: Tensor) -> bool:
    return entry.dtype == torch.uint8 and entry.ndim == 3


def _is_cloud(entry: Tensor) -> bool:
    return entry.is_floating_point() and entry.ndim == 2 and len(entry) >= FEWEST and entry.shape[1] in (3, 6)


def scratch(
    event_shape: Sequence[int],
    obs_spec: Tree,
    width: Size = 256,
    depth: Size = 2,
    average: bool = False,
    running: bool = True,
) -> VelocityField:
    """An MLP over numbers, with an encoder where there is a picture or a cloud; numbers are normalised."""
    seen = Seen.of(obs_spec)
    model: Any = PixelField if seen.camera is not None else CloudField if seen.cloud is not None else MLPField
    return model(event_shape=event_shape, width=width, depth=depth, average=average, running=running, **seen.shapes)


def fit_normalizers(field: VelocityField, moments: Tensor, obs_spec: Tree) -> None:
    """Statistics (3, D) of all numbers that are observed, in the order of their names, to the field's normalisers."""
    if isinstance(field, CloudField):
        field.fit(moments, Seen.of(obs_spec).before)
    else:
        cast(Normalizer, field.normalizer).moments.copy_(moments)


def make_field(spec: Any, obs_spec: Tree, event_shape: Sequence[int], trust_code: bool = False) -> VelocityField:
    """The model of a config's `policy.field`, told what is observed and what an action is."""
    seen = Seen.of(obs_spec)
    name, _ = registry.split_spec("policy.field", spec)
    asked = registry.settings(registry.find("model", name, trust_code))
    if "pixels" in asked and seen.camera is None:
        raise ValueError(f"{name} reads a picture and the simulator shows {seen.numbers} numbers: use scratch, or mlp")
    if "points" in asked and seen.cloud is None:
        raise ValueError(f"{name} reads a cloud of points and the simulator shows none: use scratch")
    if "obs_dim" in asked and seen.camera is not None:
        raise ValueError(f"{name} reads numbers and the simulator shows a picture {seen.pixels}: use scratch, or pixel")
    if "obs_dim" in asked and seen.cloud is not None:
        raise ValueError(f"{name} reads numbers and the simulator shows a cloud {seen.points}: use scratch, or cloud")
    supplied = {"obs_spec": obs_spec, "event_shape": tuple(event_shape), **seen.shapes}
    return registry.build("model", "policy.field", spec, supplied, trust_code)
