"""How far the law of a sampler's result is from its target, without any network and without sampling noise.

For a Gaussian target N(m, s^2) the exact velocity is affine in x,

    v(x, t) = m + (t s^2 - (1 - t)) / ((1 - t)^2 + t^2 s^2) (x - t m),

and so is every kernel and solver step: the end is an affine function of the independent noises, read off by
running the chain once per noise on the unit vector of that noise.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from rlflow.flow.kernels import Kernel
from rlflow.flow.path import at_start, expand
from rlflow.flow.solvers import Solver
from rlflow.flow.steps import Plan
from rlflow.types import Cond

MEAN, STD = 2.0, 0.5


def exact_velocity(x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
    """E[x_1 - x_0 | x_t = x] for the target N(MEAN, STD^2), elementwise."""
    t = expand(t, x)
    slope = (t * STD**2 - (1 - t)) / ((1 - t).square() + t.square() * STD**2)
    return MEAN + slope * (x - t * MEAN)


def end_weights(
    kernel: Kernel, solver: Solver, plan: Plan, event_shape: tuple[int, ...], num_features: int
) -> tuple[Tensor, Tensor]:
    """Mean (*D) at t = 1, and what x_0 and the noise of each step add to it (K + 1, *D); of the plan's first row."""
    times = plan.t if plan.t.ndim == 1 else plan.t[0]
    noisy = plan.noisy if plan.noisy.ndim == 1 else plan.noisy[0]
    num = plan.num_steps + 2  # no noise at all, x_0, and the noise of each step
    unit = torch.eye(num, dtype=torch.float64)[:, 1:]
    hidden = torch.zeros(num, num_features, dtype=torch.float64)
    cond = Cond({"pooled": hidden})
    like = torch.ones((num, *event_shape), dtype=torch.float64)
    x, memory = at_start(expand(unit[:, 0], like) * like, float(times[0])), None
    for k in range(plan.num_steps):
        t, t_next = times[k].expand(num), times[k + 1].expand(num)
        if noisy[k]:
            step = kernel(x, exact_velocity(x, t, t_next - t, cond), t, t_next, hidden)
            x, memory = step.mean + step.std * expand(unit[:, k + 1], like), None
        else:
            x, memory = solver(exact_velocity, x, t, t_next, cond, memory)
    return x[0], x[1:] - x[0]


def end_moments(
    kernel: Kernel, solver: Solver, plan: Plan, event_shape: tuple[int, ...], num_features: int
) -> tuple[float, float]:
    """Mean and std at t = 1, exact in float64 and averaged over event dims, of the chain of the plan's first row."""
    mean, weights = end_weights(kernel, solver, plan, event_shape, num_features)
    return float(mean.mean()), float(weights.square().sum(0).mean().sqrt())


@torch.no_grad()
def start_correlation(
    kernel: Kernel, solver: Solver, plan: Plan, event_shape: tuple[int, ...], num_features: int
) -> float:
    """|correlation| of x_0 and the sample, worst over event dims: 0 where the chain has forgotten its start."""
    kernel = copy.deepcopy(kernel).to("cpu", torch.float64)
    _, weights = end_weights(kernel, solver, plan, event_shape, num_features)
    return float((weights[0].abs() / weights.square().sum(0).sqrt()).max())


def end_error(
    kernel: Kernel, solver: Solver, plan: Plan, event_shape: tuple[int, ...] = (1,), num_features: int = 1
) -> float:
    """Wasserstein-2 distance between the end of the chain and the target N(2, .5^2), per event dim."""
    mean, std = end_moments(kernel, solver, plan, event_shape, num_features)
    return math.hypot(mean - MEAN, std - STD)
