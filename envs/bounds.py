"""Bounds of actions: policies act in [-1, 1], simulators between bounds of their own."""

from __future__ import annotations

import torch
from torch import Tensor


class Bounds:
    """Clips actions (..., *A) to [-1, 1] and stretches them to `low`, `high` (*A).

    A number that is bounded on one side only passes unchanged up to that bound, one without bounds altogether.
    """

    def __init__(self, low: Tensor, high: Tensor):
        if not bool((low <= high).all()):  # nan too
            raise ValueError(f"action bounds need low <= high, got {low.tolist()} and {high.tolist()}")
        self.low, self.high = low, high
        self._unit = bool((low == -1).all() and (high == 1).all())
        bounded = low.isfinite() & high.isfinite()
        self._limit = torch.where(bounded, 1.0, torch.inf)
        self._half = torch.where(bounded, (high - low) / 2, 1.0)
        self._centre = torch.where(bounded, (high + low) / 2, 0.0)

    def __call__(self, action: Tensor) -> Tensor:
        """Actions as the simulator takes them."""
        if self._unit:
            return action.clamp(-1.0, 1.0)
        stretched = action.clamp(-self._limit, self._limit) * self._half + self._centre
        return stretched.clamp(self.low, self.high)  # one bound alone, and what rounding put beyond two

    def inverse(self, action: Tensor) -> Tensor:
        """What a policy has to do (..., *A) for the simulator to take `action`."""
        return (action - self._centre) / self._half
