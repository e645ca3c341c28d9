"""Running count, mean and squared deviations of each feature, merged over batches and processes.

Moments are one float64 tensor (3, *D). Merging two sets of n and m numbers whose means differ by s:

    mean = mean_n + s m / (n + m),     deviations = d_n + d_m + s^2 n m / (n + m)     (Chan, Golub, LeVeque 1983)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlflow.parallel import dist

CONSTANT = 1e-6
"""A feature whose std is below this share of its mean (or of 1) does not vary: float32 resolves hardly less."""


def no_moments(shape: Sequence[int] = ()) -> Tensor:
    """Moments (3, *shape) of nothing."""
    return torch.zeros(3, *shape, dtype=torch.float64)


def merge(moments: Tensor, value: Tensor, counts: Tensor) -> Tensor:
    """Moments with the rows of `value` (N, *D) where `counts` (N,) is True, of every process, added."""
    before, mean, deviations = moments
    counts = counts.reshape(-1, *[1] * (value.ndim - 1)).expand(value.shape)
    shifted = torch.where(counts, value.double() - mean, 0.0)  # small numbers: sums of squares stay exact
    num, total, squares = dist.all_sum(torch.stack([counts.sum(0).double(), shifted.sum(0), shifted.square().sum(0)]))
    count = before + num
    shift = total / count.clamp(min=1)
    return torch.stack([count, mean + shift, deviations + squares - count * shift.square()])


def pooled(moments: Tensor) -> Tensor:
    """Moments (3, *D) of P features (3, P, *D) as if they were one."""
    count, mean, deviations = moments
    num = count.sum(0)
    centre = (count * mean).sum(0) / num.clamp(min=1)
    return torch.stack([num, centre, (deviations + count * (mean - centre).square()).sum(0)])


def scale(moments: Tensor) -> Tensor:
    """Biased std (*D); 1 for features that do not vary."""
    count, mean, deviations = moments
    variance = deviations / count.clamp(min=1)
    least = (CONSTANT * mean.abs().clamp(min=1)).square()
    return torch.where(variance > least, variance.clamp(min=CONSTANT**2).sqrt(), 1.0)
