"""Layers of networks of tokens: norms as one kernel each, and linear layers that round alike for any number of rows.

Under autocast a GPU's layer_norm takes and returns float32, so all that follows up to the next matrix product moves
twice the bytes, and the RMSNorm of diffusers is six kernels that keep float32 copies for the backward pass. The kernels
here add in float32 as well and round once; float32 weights stay so.

Matrix kernels of a CPU for a few rows add in another order. A product over tokens has rows enough; those of the time
and the pooled text, one a sample, are filled up alone, which costs nothing, where whole passes filled up cost double.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from rlflow.flow.field import FEW_ROWS


def _precision(x: Tensor, weight: Tensor | None) -> torch.dtype:
    """The wider of the two: next to 1 a weight's small steps would be lost in bfloat16."""
    return x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)


class Linear(nn.Linear):
    """nn.Linear whose result for a row does not depend, on a CPU, on how many rows there are."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if x.device.type != "cpu" or x.numel() >= FEW_ROWS * x.shape[-1] or not x.numel():
            return super().forward(x)
        flat = x.flatten(0, -2)
        filled = torch.cat([flat, flat[-1:].expand(FEW_ROWS - len(flat), -1)])
        return super().forward(filled)[: len(flat)].view(*x.shape[:-1], -1)


def fill_up(network: nn.Module) -> None:
    """Change the class of plain linear layers in `network`."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that autocast leaves alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x (..., *normalized_shape), in its dtype."""
        dtype = _precision(x, self.weight)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019)."""

    eps: float | None
    weight: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x (..., D), in its dtype."""
        dtype = _precision(x, self.weight)
        weight = None if self.weight is None else self.weight.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x.to(dtype), x.shape[-1:], weight, eps=self.eps).to(x.dtype)


def fuse(network: nn.Module) -> None:
    """Change the class of the norms in `network`; their parameters and names stay."""
    from diffusers.models import normalization

    for module in network.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = LayerNorm
        elif type(module) in (nn.RMSNorm, normalization.RMSNorm) and _is_plain(module):
            module.__class__ = RMSNorm


def _is_plain(norm: nn.Module) -> bool:
    """Over the last axis alone, without a bias."""
    shape = getattr(norm, "normalized_shape", getattr(norm, "dim", ()))
    return len(shape) == 1 and getattr(norm, "bias", None) is None
