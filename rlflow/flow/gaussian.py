"""The distribution of one denoising step, with exact log-density, KL and entropy.

`reduce` over event dims is always explicit: image papers take the mean (a clip of 1e-4 means nothing
under a sum), robot papers the sum, FPO++ the sum over the root of their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlflow.flow.path import at_least_float

Reduce = Literal["mean", "sum", "sqrt"]
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def reduce_events(value: Tensor, reduce: Reduce, batch_dims: int = 1) -> Tensor:
    """Mean, sum, or sum / sqrt(number), over all axes after the first `batch_dims`."""
    flat = value.flatten(batch_dims) if value.ndim > batch_dims else value.unsqueeze(-1)
    if reduce == "sqrt":
        return flat.sum(-1) / math.sqrt(flat.shape[-1])
    return flat.mean(-1) if reduce == "mean" else flat.sum(-1)


@dataclass(frozen=True)
class Gaussian:
    """Independent normal over events: mean (N, *D), std (N, ...) broadcastable to it."""

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        """Half-precision parameters are promoted: densities and KL are never computed in them."""
        object.__setattr__(self, "mean", at_least_float(self.mean))
        object.__setattr__(self, "std", at_least_float(self.std))

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise; gradients flow."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor, reduce: Reduce, batch_dims: int = 1, mask: Tensor | None = None) -> Tensor:
        """Exact log-density of x in nats, reduced over the event.

        Entries where `mask` (broadcastable to x) is False are left out; a mean still divides by all of them.
        """
        z = (at_least_float(x) - self.mean) / self.std
        density = -0.5 * z.square() - self.std.log() - HALF_LOG_2PI
        return reduce_events(density if mask is None else torch.where(mask, density, 0.0), reduce, batch_dims)

    def kl(self, other: Gaussian, reduce: Reduce, batch_dims: int = 1) -> Tensor:
        """KL(self || other) in nats, exact also for unequal std."""
        ratio = self.std / other.std
        z = (self.mean - other.mean) / other.std
        return reduce_events(0.5 * (ratio.square() + z.square() - 1) - ratio.log(), reduce, batch_dims)

    def entropy(self, reduce: Reduce, batch_dims: int = 1) -> Tensor:
        """Differential entropy in nats."""
        per_dim = (self.std.log() + HALF_LOG_2PI + 0.5).expand_as(self.mean)
        return reduce_events(per_dim, reduce, batch_dims)
