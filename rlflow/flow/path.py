"""The straight path x_t = (1 - t) x_0 + t x_1 and the quantities a velocity implies on it.

x_0 ~ N(0, I) is noise, x_1 is data, v = x_1 - x_0 (Lipman et al. 2023; Liu et al. 2023). With the
conditional expectation in place of v, `data` and `noise` are posterior means and `score` is the
score of the marginal density at time t.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand(t: Tensor, x: Tensor) -> Tensor:
    """t (N,) to (N, 1, ..., 1) so that it broadcasts against x (N, *D)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def at_least_float(x: Tensor) -> Tensor:
    """x in promote_types(x.dtype, float32): all chain mathematics runs in at least single precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """Point of the path at t (N,)."""
    t = expand(t, x_1)
    return (1 - t) * x_0 + t * x_1


def at_start(noise: Tensor, t: float) -> Tensor:
    """Where a chain that starts at t begins, of noise N(0, I): its spread is that of data of unit variance there."""
    return noise if t == 0 else noise * (t**2 + (1 - t) ** 2) ** 0.5


def data(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """E[x_1 | x_t] = x + (1 - t) v."""
    return x + (1 - expand(t, x)) * v


def noise(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """E[x_0 | x_t] = x - t v."""
    return x - expand(t, x) * v


def score(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Gradient of log p_t at x: (t v - x) / (1 - t), finite for t < 1."""
    t = expand(t, x)
    return (t * v - x) / (1 - t)
