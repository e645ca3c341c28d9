"""Denoising time grids (K + 1,) from 0 (noise) to 1 (data), in float64, and training times.

A model that knows nothing of the first times (`VelocityField.first_time`) has grids of its own that start later.

Every grid is a callable of the number of steps, so that one policy trains with K = 8 and is
deployed with K = 40. Foreign sigma grids (1 = noise) enter through `FromSigmas` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.ranges import Positive, Range


class TimeGrid(Protocol):
    """num_steps K -> strictly increasing times (K + 1,) with ends 0 and 1."""

    def __call__(self, num_steps: int) -> Tensor: ...


Steepness = Annotated[float, Range("must be positive", 0, 60, open_low=True)]
"""Above it the ends of the curve are no longer apart in float64."""


NEAR = 1e-9
"""Rounding of a first time that came as 1 - sigma."""


def check_grid(t: Tensor, first_time: float = 0.0) -> Tensor:
    """Return t, or raise ValueError unless it increases strictly to 1, from 0 or from a time after `first_time`."""
    if t.ndim != 1 or len(t) < 2:
        raise ValueError(f"a time grid needs at least 2 times in one dimension, got shape {tuple(t.shape)}")
    starts = t[0] >= first_time - NEAR if first_time else t[0] == 0
    if not starts or t[-1] != 1 or not bool((t.diff() > 0).all()):
        raise ValueError(f"a time grid must increase strictly from {first_time:.3g} to 1, got {t.tolist()}")
    return t


def _unit(num_steps: int) -> Tensor:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)


def between(t: Tensor, index: Tensor) -> Tensor:
    """Times at the places `index` (M,) in [1, K] of a grid (K + 1,), which need not be whole.

    Linear in the log-odds of t against those of the even grid i / K: a shift s moves these by -log s, so what is
    between the times of a shifted grid is the shifted even grid. In the last step the shift is that of its start.
    """
    num_steps = len(t) - 1
    even, times = (_unit(num_steps)[1:-1].logit(), t[1:-1].logit())
    slope = torch.cat([times.diff() / even.diff(), torch.ones(1, dtype=t.dtype)])
    start = index.floor().long().clamp(max=num_steps - 1) - 1
    return torch.sigmoid(times[start] + slope[start] * ((index / num_steps).logit() - even[start]))


@dataclass(frozen=True)
class Uniform:
    """Equal steps."""

    def __call__(self, num_steps: int) -> Tensor:
        return _unit(num_steps)


@dataclass(frozen=True)
class Shifted:
    """SD3's shift in our direction: sigma' = s sigma / (1 + (s - 1) sigma), sigma = 1 - t (Esser et al. 2024)."""

    shift: Positive = 3.0

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}; 1 is the uniform grid")

    def __call__(self, num_steps: int) -> Tensor:
        t = _unit(num_steps)
        return t / (self.shift + (1 - self.shift) * t)


@dataclass(frozen=True)
class Sigmoid:
    """A logistic curve through (0, 0) and (1, 1): dense at both ends; `scale` -> 0 is uniform (Lumina-Next)."""

    scale: Steepness = 4.0

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"scale must be positive, got {self.scale}; use the uniform grid for 0")

    def __call__(self, num_steps: int) -> Tensor:
        curve = torch.sigmoid(self.scale * (_unit(num_steps) - 0.5))
        t = (curve - curve[0]) / (curve[-1] - curve[0])
        t[0], t[-1] = 0.0, 1.0
        return t


@dataclass(frozen=True)
class FromSigmas:
    """A grid read from a scheduler: decreasing sigmas from 1 to 0, as the foreign pipeline sets them."""

    sigmas: Sequence[float]

    def __post_init__(self) -> None:
        check_grid(1 - torch.as_tensor(self.sigmas, dtype=torch.float64))

    def __call__(self, num_steps: int) -> Tensor:
        if num_steps != len(self.sigmas) - 1:
            raise ValueError(
                f"these sigmas are a grid of {len(self.sigmas) - 1} steps, not {num_steps}: read the "
                "scheduler again for another number of steps"
            )
        return 1 - torch.as_tensor(self.sigmas, dtype=torch.float64)


@dataclass(frozen=True)
class FromScheduler:
    """The grid that the model's own pipeline sets, of a pretrained checkpoint, at the resolution in place."""

    field: VelocityField

    def __call__(self, num_steps: int) -> Tensor:
        return check_grid(self.field.times(num_steps), self.field.first_time)


def logit_normal(num: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training times (num,) = sigmoid(N(mean, std^2)); mean > 0 prefers the data end (Esser et al. 2024)."""
    return torch.sigmoid(mean + std * torch.randn(num, generator=generator, device=generator.device))


def uniform_times(num: int, generator: torch.Generator) -> Tensor:
    """Training times (num,), all alike in [0, 1)."""
    return torch.rand(num, generator=generator, device=generator.device)
