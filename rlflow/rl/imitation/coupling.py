"""A density of vectors by affine couplings, exact and invertible (RealNVP, Dinh et al. 2017).

A layer keeps one half of the numbers and moves the other by what the kept half says,

    z_k = x_k,     z_m = (x_m - shift(x_k)) exp(-scale(x_k)),     log p(x) = log N(z; 0, I) - sum of all scales

with `scale` bounded by a tanh, so that no single layer can stretch a direction beyond e^-2 to e^2. The halves take
turns; a diagonal layer before them all reaches what no half can move, a single number above all.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.models.mlp import mlp

BOUND = 2.0
"""Of the logarithm of a layer's scale."""


class Coupling(nn.Module):
    """One layer: numbers where `moved` (F,) is true are moved by the others; the identity at first."""

    moved: Tensor

    def __init__(self, moved: Tensor, width: int):
        super().__init__()
        self.register_buffer("moved", moved, persistent=False)
        kept, num = int((~moved).sum()), int(moved.sum())
        self.net = mlp([kept, width, width, 2 * num])
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def _terms(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.net(kept).chunk(2, -1)
        return shift, BOUND * torch.tanh(raw / BOUND)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(z (N, F), log |dz/dx| (N,)) of x (N, F)."""
        shift, scale = self._terms(x[:, ~self.moved])
        z = x.clone()
        z[:, self.moved] = (x[:, self.moved] - shift) * (-scale).exp()
        return z, -scale.sum(-1)

    def inverse(self, z: Tensor) -> Tensor:
        """x (N, F) of z (N, F)."""
        shift, scale = self._terms(z[:, ~self.moved])
        x = z.clone()
        x[:, self.moved] = z[:, self.moved] * scale.exp() + shift
        return x


class CouplingDensity(nn.Module):
    """Density of vectors (N, F), N(0, I) at first; `log_prob` is exact, `sample` its law."""

    def __init__(self, num_inputs: int, layers: int = 4, width: int = 64):
        super().__init__()
        if num_inputs < 1 or layers < 0:
            raise ValueError(f"need num_inputs >= 1 and layers >= 0, got {num_inputs} and {layers}")
        odd = torch.arange(num_inputs) % 2 == 1
        halves = [odd if i % 2 == 0 else ~odd for i in range(layers if num_inputs > 1 else 0)]
        self.num_inputs = num_inputs
        self.layers = nn.ModuleList([Coupling(moved, width) for moved in halves])
        self.mean, self.log_std = (nn.Parameter(torch.zeros(num_inputs)) for _ in range(2))

    def latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(z (N, F), log |dz/dx| (N,)): z is N(0, I) where x has this density."""
        z, log_det = x, -self.log_std.sum().expand(len(x))
        z = (z - self.mean) * (-self.log_std).exp()
        for layer in self.layers:
            z, more = layer(z)
            log_det = log_det + more
        return z, log_det

    def log_prob(self, x: Tensor) -> Tensor:
        """(N,) nats at x (N, F)."""
        z, log_det = self.latent(x)
        return log_det - (z.square() + math.log(2 * math.pi)).sum(-1) / 2

    def inverse(self, z: Tensor) -> Tensor:
        """x (N, F) of which z (N, F) is the latent."""
        for layer in reversed(self.layers):
            assert isinstance(layer, Coupling)
            z = layer.inverse(z)
        return z * self.log_std.exp() + self.mean

    @torch.no_grad()
    def sample(self, num: int, rng: torch.Generator) -> Tensor:
        """(num, F) of this density, drawn on the CPU."""
        return self.inverse(torch.randn(num, self.num_inputs, generator=rng).to(self.mean))
