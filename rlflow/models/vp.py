"""Variance-preserving diffusion models in flow coordinates (Diff2Flow, Schusterbauer et al. 2025).

Such a model knows z = alpha x_1 + sigma x_0 with alpha^2 + sigma^2 = 1, from a table of alphas by index. Divided by
alpha + sigma it lies on our straight path:

    t = alpha / (alpha + sigma),   x = z / (alpha + sigma) = (1 - t) x_0 + t x_1,   v = x_1^ - x_0^

    it predicts the noise e:                      x_0^ = e,                   x_1^ = (z - sigma e) / alpha
    it predicts w = alpha x_0 - sigma x_1:        x_0^ = sigma z + alpha w,   x_1^ = alpha z - sigma w

An Euler step of v is a DDIM step. The table's last entry still holds some data (t = .064 for Stable Diffusion): the
model knows nothing of earlier times, and its own pipeline starts from pure noise there as ours does (`at_start`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.flow.matching import cfm_loss
from rlflow.flow.path import at_least_float, expand
from rlflow.types import Cond

Parts = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(z, prediction, alpha, sigma) -> (x_0^, x_1^)."""


def of_noise(z: Tensor, e: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """From the predicted noise."""
    return e, (z - sigma * e) / alpha


def of_v(z: Tensor, w: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """From the predicted w (Salimans & Ho 2022)."""
    return sigma * z + alpha * w, alpha * z - sigma * w


PREDICTIONS: dict[str, Parts] = {"epsilon": of_noise, "v_prediction": of_v}
"""By diffusers' name of what is predicted."""
WHOLE = 1e-2
"""How near a whole number an index is taken for it: float32 times are that far off, and networks are told indices."""


class Table:
    """`alphas_cumprod` (T,) falling, alpha^2 by index; `predicts` is a key of PREDICTIONS."""

    def __init__(self, alphas_cumprod: Tensor, predicts: str):
        square = alphas_cumprod.double()
        alpha, sigma = square.sqrt(), (1 - square).sqrt()
        self.times = alpha / (alpha + sigma)
        """(T,) float64, falling from near the data."""
        if not bool((self.times.diff() < 0).all()):
            raise ValueError("a table of alphas must fall from data to noise")
        if predicts not in PREDICTIONS:
            raise ValueError(f"the network predicts {predicts!r}, and one of {sorted(PREDICTIONS)} is wanted")
        if self.first_time == 0 and predicts == "epsilon":
            raise ValueError("its table ends in pure noise, where predicted noise says nothing of the data")
        self.parts = PREDICTIONS[predicts]

    @property
    def first_time(self) -> float:
        """Where the table ends, and grids start."""
        return float(self.times[-1])

    def index(self, t: Tensor) -> Tensor:
        """Of times (N,), between the entries too, in float32; beyond the ends that of the end."""
        rising = self.times.flip(0).to(t.device)
        t = t.double().contiguous()
        above = torch.searchsorted(rising, t).clamp(1, len(rising) - 1)
        low, high = rising[above - 1], rising[above]
        found = len(rising) - 1 - (above - 1 + ((t - low) / (high - low)).clamp(0, 1))
        whole = found.round()
        return torch.where((found - whole).abs() < WHOLE, whole, found).float()

    def velocity(self, x: Tensor, t: Tensor, network: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(N, *D) at x (N, *D), t (N,) of network(z, index (N,)) -> prediction, in float32 at least."""
        x, left = at_least_float(x), 1 - t
        norm = (t.square() + left.square()).sqrt()  # 1 / (alpha + sigma)
        alpha, sigma = (expand(part / norm, x).to(x.dtype) for part in (t, left))
        z = x / expand(norm, x).to(x.dtype)
        x_0, x_1 = self.parts(z, at_least_float(network(z, self.index(t))), alpha, sigma)
        return x_1 - x_0


def noise_loss(field: VelocityField, x_1: Tensor, cond: Cond, x_0: Tensor, t: Tensor) -> Tensor:
    """Squared error (N,) of the predicted noise, t times the velocity's: what diffusion models are trained with."""
    return t.square() * cfm_loss(field, x_1, cond, x_0, t)
