"""The norms of a pretrained network: one kernel each, in the precision of what they are given.

Under autocast a GPU's layer_norm takes and returns float32, so all that follows up to the next matrix product moves
twice the bytes, and the RMSNorm of diffusers is six kernels that keep float32 copies for the backward pass. The kernels
here add in float32 as well and round once.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def _like(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that autocast leaves alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x (..., *normalized_shape), in its dtype."""
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, _like(self.weight, x), _like(self.bias, x), self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019)."""

    eps: float | None
    weight: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x (..., D), in its dtype."""
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, x.shape[-1:], _like(self.weight, x), eps=self.eps)


def fuse(network: nn.Module) -> None:
    """Change the class of the norms in `network`; their parameters and names stay."""
    from diffusers.models import normalization

    for module in network.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = LayerNorm
        elif type(module) in (nn.RMSNorm, normalization.RMSNorm) and getattr(module, "bias", None) is None:
            module.__class__ = RMSNorm
