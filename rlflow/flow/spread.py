"""The spread of data around where a step leads, and its loss: AdaFlow (Hu et al. 2024).

    loss = |x_1 - x_0 - v|^2 / D + nll,    nll = e / (2 s^2) + log s,    e = the first term, held

The optimum is s^2 = E[e | x_t] = Var[x_1 | x_t] / (1 - t)^2, a mean over the event of D numbers, so what is asked of s
does not depend on D (the release sums, and its s^2 is D times this). Where it is 0 one step leads to the data.
"""

from __future__ import annotations

from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.flow.path import at_least_float, interpolate
from rlflow.types import Cond


def spread_loss(field: VelocityField, x_1: Tensor, cond: Cond, x_0: Tensor, t: Tensor) -> Tensor:
    """Losses (N,) of velocity and spread at data x_1, noise x_0 (N, *D) and times t (N,)."""
    x_1, x_0 = at_least_float(x_1), at_least_float(x_0)
    told = at_least_float(field.with_spread(interpolate(x_0, x_1, t), t, 0 * t, cond))
    error = (told[:, :-1] - (x_1 - x_0).flatten(1)).square().mean(1)
    return error + spread_nll(error.detach(), told[:, -1])


def spread_nll(error: Tensor, log_spread: Tensor) -> Tensor:
    """-log N(0, s^2) of errors whose squares (N,) are given, less a constant."""
    return error * (-2 * log_spread).exp() / 2 + log_spread
