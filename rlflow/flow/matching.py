"""Conditional flow matching: regress the velocity of a straight path (Lipman et al. 2023, Liu et al. 2023).

    loss = || field(x_t, t) - (x_1 - x_0) ||^2,     x_t = (1 - t) x_0 + t x_1,     x_0 ~ N(0, I)

Its optimum is v*(x, t) = E[x_1 - x_0 | x_t = x]. A coupling decides which noise meets which data; both
below keep the two marginals, so the optimum transports noise to data either way. Optimal transport inside the
minibatch (Tong et al. 2024, Pooladian et al. 2023) makes the paths straighter, but only where nothing is
conditioned on: with a condition, the noise that meets it in training is no longer what it meets at inference.

A Shortcut field u(x, t, dt) also knows the average velocity over steps it will be asked for (Frans et al. 2024):
one step of size d goes where two of d / 2 go,

    u(x, t, d) = (u(x, t, d/2) + u(x', t + d/2, d/2)) / 2,     x' = x + d/2 u(x, t, d/2).

A spread head tells how far data lie from where the velocity leads (AdaFlow, Hu et al. 2024), by the likelihood of e:

    nll = e / (2 s^2) + log s,     e = |x_1 - x_0 - v|^2 / D, held

whose optimum is s^2 = E[e | x_t] = Var[x_1 | x_t] / (1 - t)^2, a mean over the event of D numbers, so what is asked
of s does not depend on D (the release sums, and its s^2 is D times this). Where it is 0, one step leads to the data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.flow.path import at_least_float, expand, interpolate
from rlflow.flow.solvers import Velocity
from rlflow.types import Cond

MatchingLoss = Callable[[VelocityField, Tensor, Cond, Tensor, Tensor], Tensor]
"""(field, x_1 (N, *D), cond, x_0 (N, *D), t (N,)) -> losses (N,)."""


class Scheduled(ABC):
    """A loss that changes in the course of a training, or takes targets from a second network."""

    @abstractmethod
    def at(self, progress: float, teacher: VelocityField) -> MatchingLoss:
        """The loss after a share `progress` of the training; `teacher` is the weight average, for what may lag."""


def loss_at(loss: MatchingLoss | Scheduled, progress: float, teacher: VelocityField) -> MatchingLoss:
    """Any loss as it is after a share `progress` of the training."""
    return loss.at(progress, teacher) if isinstance(loss, Scheduled) else loss


Coupling = Callable[[Tensor, Tensor], Tensor]
"""(x_0 (N, *D), x_1 (N, *D)) -> x_0 with its rows reordered to meet the rows of x_1."""


def on_path(velocity: Velocity, x_1: Tensor, cond: Cond, x_0: Tensor, t: Tensor) -> Tensor:
    """The velocity (N, *D) where data x_1 and noise x_0 (N, *D) meet at times t (N,); its target is x_1 - x_0."""
    x_1, x_0 = at_least_float(x_1), at_least_float(x_0)
    return at_least_float(velocity(interpolate(x_0, x_1, t), t, torch.zeros_like(t), cond))


def cfm_loss(field: VelocityField, x_1: Tensor, cond: Cond, x_0: Tensor, t: Tensor) -> Tensor:
    """Squared velocity error (N,), a mean over the event, at data x_1, noise x_0 (N, *D) and times t (N,)."""
    error = on_path(field, x_1, cond, x_0, t) - (at_least_float(x_1) - at_least_float(x_0))
    return error.square().flatten(1).mean(1)


@dataclass(frozen=True)
class ShortcutLoss:
    """Self-consistency of step sizes 1, 1/2, ... 1 / `max_steps` for a share of the rows, flow matching for the others.

    Only sizes that inference uses are trained: the halves of the smallest one are steps of the instantaneous
    velocity (dt = 0), which the matched rows teach. The two small steps are a target and carry no gradient.
    """

    max_steps: int = 4
    share: float = 0.25

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.max_steps & (self.max_steps - 1):
            raise ValueError(f"max_steps must be 1, 2, 4, ... for steps to halve, got {self.max_steps}")
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {self.share}")

    def __call__(self, field: VelocityField, x_1: Tensor, cond: Cond, x_0: Tensor, t: Tensor) -> Tensor:
        """Squared errors (N,) of a field that reads dt; the first rows are those of self-consistency."""
        if not field.uses_dt:
            raise ValueError(f"{type(field).__name__} does not read dt: build it with average=True")
        x_1, x_0 = at_least_float(x_1), at_least_float(x_0)
        num, rows = round(self.share * len(t)), torch.arange(len(t), device=t.device)
        size, start = self.steps(t[:num])
        times = torch.cat([start, t[num:]])
        x = interpolate(x_0, x_1, times)
        target = torch.cat([self.two_halves(field, x[:num], start, size, cond.index(rows[:num])), (x_1 - x_0)[num:]])
        v = field(x, times, torch.cat([size, torch.zeros_like(t[num:])]), cond)
        return (at_least_float(v) - target).square().flatten(1).mean(1)

    def steps(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(size (N,), start (N,)): sizes in turn, each beginning at the last of its multiples that is not after t."""
        num_sizes = self.max_steps.bit_length()
        size = 0.5 ** (torch.arange(len(t), device=t.device) % num_sizes).to(t)
        return size, torch.minimum((t / size).floor() * size, 1 - size)

    @torch.no_grad()
    def two_halves(self, field: VelocityField, x: Tensor, t: Tensor, size: Tensor, cond: Cond) -> Tensor:
        """Mean velocity (N, *D) of two steps of half the size."""
        half = size / 2
        dt = torch.where(half * self.max_steps >= 1, half, torch.zeros_like(half))
        first = at_least_float(field(x, t, dt, cond))
        second = at_least_float(field(x + expand(half, x) * first, t + half, dt, cond))
        return (first + second) / 2


@dataclass(frozen=True)
class SpreadLoss:
    """Flow matching, and the likelihood of its error by the head. `published` sums that error over the event.

    Then s^2 is D times as large, so the solver's eta has to be sqrt(D) times as large for the same steps.
    """

    published: bool = False

    def __call__(self, field: VelocityField, x_1: Tensor, cond: Cond, x_0: Tensor, t: Tensor) -> Tensor:
        """Losses (N,) of velocity and spread at data x_1, noise x_0 (N, *D) and times t (N,)."""
        told = on_path(field.with_spread, x_1, cond, x_0, t)
        square = (told[:, :-1] - (at_least_float(x_1) - at_least_float(x_0)).flatten(1)).square()
        judged = square.sum(1) if self.published else square.mean(1)
        return square.mean(1) + spread_nll(judged.detach(), told[:, -1])


def spread_nll(error: Tensor, log_spread: Tensor) -> Tensor:
    """-log N(0, s^2) of errors whose squares (N,) are given, less a constant."""
    return error * (-2 * log_spread).exp() / 2 + log_spread


def independent(x_0: Tensor, x_1: Tensor) -> Tensor:
    """Noise meets data by chance, as drawn."""
    return x_0


def minibatch_ot(x_0: Tensor, x_1: Tensor) -> Tensor:
    """Noise permuted to the least total squared distance to the data: O(N^3) on the CPU, fine to N = 1000."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(at_least_float(x_0).flatten(1), at_least_float(x_1).flatten(1)).square()

    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    order = torch.empty(len(x_0), dtype=torch.long)
    order[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return x_0[order.to(x_0.device)]
