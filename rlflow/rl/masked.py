"""Sums over samples of which some are masked."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_sum(value: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight * value where a masked entry may be nan (`where` before arithmetic: 0 * nan is nan)."""
    return (torch.where(weight > 0, value, 0.0) * weight).sum()
