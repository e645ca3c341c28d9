"""Density of a whole denoising path and its entropy, the surrogate of SAC's action entropy for a flow (SAC Flow, 2025).

    log p(path) = log N(x_0; 0, I) + sum_k log N(x_{k+1}; mean_k, std_k) - log |da/dx_K|

It counts the randomness of every denoising step, so its scale is not that of -log pi(a | s): it depends on K and on the
bounds of the noise. With std_k <= S_k no path has more entropy than

    H_max = D/2 log(2 pi e) + sum_k D log(S_k sqrt(2 pi e)),

and a temperature that is tuned to a target above it grows without end. A field that forgets x_0 (a Gaussian actor)
has no first term, and the rest is the exact density of its action.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from rlflow.flow.gaussian import HALF_LOG_2PI, Gaussian
from rlflow.flow.policy import FlowPolicy
from rlflow.types import Chain

HALF_LOG_2PIE = HALF_LOG_2PI + 0.5


def path_log_prob(policy: FlowPolicy, chain: Chain) -> Tensor:
    """log p(path) (N,) in nats of a chain whose steps are all noisy; gradients flow."""
    steps = Gaussian(chain.mean, chain.std).log_prob(chain.x_next, "sum", batch_dims=2).sum(1)
    total = steps - policy.squash.log_det(chain.final)
    if policy.field.forgets_start:
        return total
    x_0 = chain.x[:, 0]
    return total + Gaussian(torch.zeros_like(x_0), torch.ones_like(x_0)).log_prob(x_0, "sum")


def path_entropy(policy: FlowPolicy, std: Tensor) -> float:
    """Entropy in nats of a path with std (K,) per step and number, before the squash, which only lowers it."""
    num = math.prod(policy.event_shape)
    start = 0.0 if policy.field.forgets_start else num * HALF_LOG_2PIE
    return start + num * float((std.log() + HALF_LOG_2PIE).sum())


def std_bounds(policy: FlowPolicy) -> tuple[Tensor, Tensor]:
    """Least and largest std (K,) of the steps, float64 on the CPU."""
    grid = policy.grid(policy.num_steps)
    kernel = copy.deepcopy(policy.kernel).to("cpu", torch.float64)
    with torch.no_grad():
        return kernel.min_std(grid[:-1], grid[1:]), kernel.max_std(grid[:-1], grid[1:])


def highest_entropy(policy: FlowPolicy) -> float:
    """H_max in nats."""
    return path_entropy(policy, std_bounds(policy)[1])


def entropy_target(policy: FlowPolicy, per_number: float | None) -> float:
    """The target in nats: `per_number` times D, or that of the noise's middle less D / 2.

    ValueError where no noise within the kernel's bounds has so much entropy.
    """
    num = math.prod(policy.event_shape)
    low, high = std_bounds(policy)
    highest = path_entropy(policy, high)
    target = path_entropy(policy, (low * high).sqrt()) - 0.5 * num if per_number is None else per_number * num
    if target >= highest:
        raise ValueError(
            f"target_entropy of {target / num:.3g} nats per number cannot be reached: with a std of at most "
            f"{', '.join(f'{s:.3g}' for s in high.tolist())} a path has less than {highest / num:.3g}, and the "
            "temperature would grow without end; lower target_entropy, leave it out, or raise policy.kernel.std_max"
        )
    return target
