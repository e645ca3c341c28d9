"""Toy rewards of one line each: quick to compute, hacked by a policy within minutes, good for a first run."""

from __future__ import annotations

from torch import Tensor

from rlflow.rewards.component import differentiable


@differentiable
def brightness(images: Tensor) -> Tensor:
    """(N,) mean of all channels, in [0, 1]."""
    return images.float().mean((1, 2, 3))


@differentiable
def redness(images: Tensor) -> Tensor:
    """(N,) mean red minus the mean of green and blue, in [-1, 1]."""
    red, green, blue = images.float().mean((2, 3)).unbind(1)
    return red - (green + blue) / 2
