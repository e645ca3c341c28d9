"""Bounds of actions: policies act in [-1, 1], simulators between bounds of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
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
        numbers = self._limit, self._half, self._centre, low, high
        self._arrays = [v.cpu().numpy() for v in (-self._limit, *numbers)]
        self._wide = self._arrays  # in the shape of the actions seen last

    def __call__(self, action: Any) -> Any:
        """Actions, a tensor or an array, as the simulator takes them."""
        if isinstance(action, np.ndarray):
            if self._wide[0].shape != action.shape:
                self._wide = [np.broadcast_to(v, action.shape).copy() for v in self._arrays]
            return self._of_array(action, *self._wide)
        inside = action.clamp(-self._limit, self._limit)
        if self._unit:
            return inside
        # one bound alone, and what rounding put beyond two
        return (inside * self._half + self._centre).clamp(self.low, self.high)

    def _of_array(self, action: Any, least: Any, most: Any, half: Any, centre: Any, low: Any, high: Any) -> Any:
        """The same; for a row np.clip takes thrice the time, and so do operands of two shapes."""
        inside = np.minimum(np.maximum(action, least), most)
        return inside if self._unit else np.minimum(np.maximum(inside * half + centre, low), high)

    def inverse(self, action: Tensor) -> Tensor:
        """What a policy has to do (..., *A) for the simulator to take `action`."""
        return (action - self._centre) / self._half
