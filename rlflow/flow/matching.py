"""Conditional flow matching: regress the velocity of a straight path (Lipman et al. 2023, Liu et al. 2023).

    loss = || field(x_t, t) - (x_1 - x_0) ||^2,     x_t = (1 - t) x_0 + t x_1,     x_0 ~ N(0, I)

Its optimum is v*(x, t) = E[x_1 - x_0 | x_t = x]. A coupling decides which noise meets which data; both
below keep the two marginals, so the optimum transports noise to data either way. Optimal transport inside the
minibatch (Tong et al. 2024, Pooladian et al. 2023) makes the paths straighter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.flow.path import at_least_float, interpolate
from rlflow.types import Cond

Coupling = Callable[[Tensor, Tensor], Tensor]
"""(x_0 (N, *D), x_1 (N, *D)) -> x_0 with its rows reordered to meet the rows of x_1."""


def cfm_loss(field: VelocityField, x_1: Tensor, cond: Cond, x_0: Tensor, t: Tensor) -> Tensor:
    """Squared velocity error (N,), a mean over the event, at data x_1, noise x_0 (N, *D) and times t (N,)."""
    x_1, x_0 = at_least_float(x_1), at_least_float(x_0)
    v = field(interpolate(x_0, x_1, t), t, torch.zeros_like(t), cond)
    return (at_least_float(v) - (x_1 - x_0)).square().flatten(1).mean(1)


def independent(x_0: Tensor, x_1: Tensor) -> Tensor:
    """Noise meets data by chance, as drawn."""
    return x_0


def minibatch_ot(x_0: Tensor, x_1: Tensor) -> Tensor:
    """Noise permuted to the least total squared distance to the data: O(N^3) on the CPU, fine to N = 1000."""
    cost = torch.cdist(at_least_float(x_0).flatten(1), at_least_float(x_1).flatten(1)).square()
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    order = torch.empty(len(x_0), dtype=torch.long)
    order[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return x_0[order.to(x_0.device)]
