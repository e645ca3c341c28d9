"""What the log says of one reward: mean and std of its scores, rows without any, failed calls, seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Meter:
    """What one reward did since the last `metrics()`."""

    rows: int = 0
    masked: int = 0
    errors: int = 0
    seconds: float = 0.0
    sum: float = 0.0
    sum_sq: float = 0.0

    def add(self, scores: Tensor, seconds: float) -> None:
        valid = ~scores.isnan()
        x = torch.where(valid, scores, 0).double()
        self.rows += len(scores)
        self.masked += int((~valid).sum())
        self.seconds += seconds
        self.sum += float(x.sum())
        self.sum_sq += float(x.square().sum())

    def metrics(self, prefix: str) -> dict[str, float]:
        count = self.rows - self.masked
        out = {f"{prefix}/masked_frac": self.masked / max(1, self.rows), f"{prefix}/seconds": self.seconds}
        if count:  # a mean of nothing is left out, not zero
            mean = self.sum / count
            out[f"{prefix}/mean"] = mean
            out[f"{prefix}/std"] = math.sqrt(max(0.0, self.sum_sq / count - mean**2))
        if self.errors:
            out[f"{prefix}/errors"] = float(self.errors)
        return out
