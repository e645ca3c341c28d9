"""ODE solvers for the steps that are not scored: (velocity, x, t, t_next, cond, memory) -> (x_next, memory).

`velocity(x, t, dt, cond)` is the policy's; t, t_next are (N,). Memory carries multistep state and is
None at the first step and after a scored one. Decisions on times use `where`, never a host sync.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlflow.flow.path import expand
from rlflow.ranges import Positive
from rlflow.types import Cond

Velocity = Callable[[Tensor, Tensor, Tensor, Cond], Tensor]
Memory = Any


class Solver(ABC):
    """Base of all solvers; stateless."""

    order: ClassVar[int] = 1
    calls: ClassVar[int] = 1
    """Network calls of one step without memory."""
    needs_instantaneous: ClassVar[bool] = True
    """False when the solver asks for dt = t_next - t, which an average-velocity field answers exactly."""

    needs_spread: ClassVar[bool] = False
    """True when `velocity` is a field's `with_spread`: (N, D + 1). Its rows have times of their own."""

    @abstractmethod
    def __call__(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, cond: Cond, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """x (N, *D) at t_next (N,), and what the next step may use."""

    def num_calls(self, num_steps: int) -> int:
        """Network calls of `num_steps` consecutive steps."""
        return self.calls * num_steps


def check_solver(solver: Solver) -> None:
    """ValueError unless a step of `solver` on two rows gives (x_next shaped like x, memory)."""
    x, t, cond = torch.zeros(2, 1), torch.zeros(2), Cond({"pooled": torch.zeros(2, 1)})
    more = int(solver.needs_spread)
    found = solver(lambda x, t, dt, cond: x.new_zeros(len(x), 1 + more), x, t, t + 0.5, cond, None)
    pair = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if pair is not found or not isinstance(pair[0], Tensor) or pair[0].shape != x.shape:
        shape = f" of shape {tuple(pair[0].shape)}" if isinstance(pair[0], Tensor) else ""
        raise ValueError(
            f"{type(solver).__name__} gave a {type(found).__name__}{shape} for x of shape (2, 1): "
            "a solver gives (x_next shaped like x, memory)"
        )


class Euler(Solver):
    """x + dt v."""

    needs_instantaneous = False

    def __call__(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, cond: Cond, memory: Memory
    ) -> tuple[Tensor, Memory]:
        dt = t_next - t
        return x + expand(dt, x) * velocity(x, t, dt, cond), None


class Heun(Solver):
    """Trapezoid with an Euler predictor; Euler into t = 1, where velocities may be singular (Karras et al. 2022)."""

    order = 2
    calls = 2

    def __call__(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, cond: Cond, memory: Memory
    ) -> tuple[Tensor, Memory]:
        dt, zero = t_next - t, torch.zeros_like(t)
        v = velocity(x, t, zero, cond)
        into_data = t_next >= 1
        t_safe = torch.where(into_data, t, t_next)
        v_next = velocity(x + expand(dt, x) * v, t_safe, zero, cond)
        slope = torch.where(expand(into_data, x), v, (v + v_next) / 2)
        return x + expand(dt, x) * slope, None


class Midpoint(Solver):
    """x + dt v(x + dt v / 2, t + dt / 2); the same as the RF-Solver."""

    order = 2
    calls = 2

    def __call__(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, cond: Cond, memory: Memory
    ) -> tuple[Tensor, Memory]:
        dt, zero = t_next - t, torch.zeros_like(t)
        half = x + expand(dt / 2, x) * velocity(x, t, zero, cond)
        return x + expand(dt, x) * velocity(half, t + dt / 2, zero, cond), None


class FireFlow(Solver):
    """Midpoint whose predictor reuses the last midpoint velocity: order 2 with K + 1 calls (Deng et al. 2024)."""

    order = 2
    calls = 2

    def __call__(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, cond: Cond, memory: Memory
    ) -> tuple[Tensor, Memory]:
        dt, zero = t_next - t, torch.zeros_like(t)
        predictor = velocity(x, t, zero, cond) if memory is None else memory
        middle = velocity(x + expand(dt / 2, x) * predictor, t + dt / 2, zero, cond)
        return x + expand(dt, x) * middle, middle

    def num_calls(self, num_steps: int) -> int:
        return num_steps + min(num_steps, 1)


class DPMSolver2M(Solver):
    """DPM-Solver++ (2M, midpoint) on data predictions m = x + (1 - t) v (Lu et al. 2022).

    With sigma = 1 - t and lambda = log(t / sigma):
    x' = (sigma'/sigma) x + (t' - (sigma'/sigma) t) [m + (m - m_prev) h / (2 h_prev)], h = lambda' - lambda.
    The correction vanishes where lambda is infinite (a first step, the second step of a grid from
    t = 0, the step into t = 1); what is left is Euler exactly.
    """

    order = 2

    def __call__(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, cond: Cond, memory: Memory
    ) -> tuple[Tensor, Memory]:
        m = x + expand(1 - t, x) * velocity(x, t, torch.zeros_like(t), cond)
        shrink = (1 - t_next) / (1 - t)
        drift = m
        if memory is not None:
            m_prev, t_prev = memory
            weight = self._correction(t_prev, t, t_next)
            drift = m + expand(weight, x) * (m - m_prev)
        x_next = expand(shrink, x) * x + expand(t_next - shrink * t, x) * drift
        return x_next, (m, t)

    @staticmethod
    def _correction(t_prev: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """h / (2 h_prev), 0 where either is infinite."""
        usable = (t_prev > 0) & (t_next < 1)
        safe_prev = torch.where(usable, t_prev, t / 2)
        safe_next = torch.where(usable, t_next, (1 + t) / 2)
        lam = [torch.logit(s) for s in (safe_prev, t, safe_next)]
        ratio = (lam[2] - lam[1]) / (2 * (lam[1] - lam[0]))
        return torch.where(usable, ratio, torch.zeros_like(ratio))


class UniPC(Solver):
    """UniPC-2 (B2(h) = e^h - 1, of data predictions; Zhao et al. 2023): a predictor whose step is corrected afterwards
    by the very call that the next step needs. One call a step; diffusers' UniPCMultistepScheduler with its defaults.

    With sigma = 1 - t, lambda = log(t / sigma), h over the step and m = x + sigma v:
    x' = (sigma'/sigma) x - t' (e^-h - 1) [m + sum_i rho_i D_i], D_i = (m_i - m) / r_i, r_i = (lambda_i - lambda) / h.
    The predictor has rho = 1/2 on the step before, the corrector solves for orders 2 and 3 with the new m among the
    m_i. A first step and the one into t = 1 are of order 1. A start at t = 0 counts as `FIRST`.
    """

    order = 3
    FIRST = 1e-6

    def __call__(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, cond: Cond, memory: Memory
    ) -> tuple[Tensor, Memory]:
        m = x + expand(1 - t, x) * velocity(x, t, torch.zeros_like(t), cond)
        before = None if memory is None else memory[-1]
        if memory is not None:
            x = self._corrected(m, t, *memory)
        slope = torch.zeros_like(m)
        if before is not None:
            m_prev, t_prev = before
            ratio = self._lambda(t_prev) - self._lambda(t)
            weight = torch.where(t_next < 1, (self._lambda(t_next) - self._lambda(t)) / (2 * ratio), 0)
            slope = expand(weight, x) * (m_prev - m)
        return self._moved(x, t, t_next, m, slope), (x, t, before, (m, t))

    @classmethod
    def _lambda(cls, t: Tensor) -> Tensor:
        """log(t / (1 - t)) of a time before 1; of 1 that of the last number before it, which nothing reads."""
        return torch.logit(t.clamp(cls.FIRST, 1 - torch.finfo(t.dtype).eps))

    @classmethod
    def _moved(cls, x: Tensor, t: Tensor, t_next: Tensor, m: Tensor, slope: Tensor) -> Tensor:
        """Both formulas: from x at t to t_next along m + slope."""
        shrink = (1 - t_next) / (1 - t.clamp(min=cls.FIRST))
        return expand(shrink, x) * x + expand(t_next - shrink * t.clamp(min=cls.FIRST), x) * (m + slope)

    def _corrected(self, m: Tensor, t: Tensor, x_s: Tensor, s: Tensor, before: Any, now: Any) -> Tensor:
        """x at t again: from x_s at s with m of t, what was known at s, and before."""
        m_s, _ = now
        h = self._lambda(t) - self._lambda(s)
        if before is None:
            return self._moved(x_s, s, t, m_s, 0.5 * (m - m_s))
        m_r, r = before
        step = torch.expm1(-h)
        ratio = (self._lambda(r) - self._lambda(s)) / h
        first = -step / h - 1
        b_0, b_1 = first / step, 2 * (-first / h - 0.5) / step
        rho = (b_1 - b_0) / (ratio - 1)
        slope = expand(rho / ratio, m) * (m_r - m_s) + expand(b_0 - rho, m) * (m - m_s)
        return self._moved(x_s, s, t, m_s, slope)


class Adaptive(Solver):
    """Euler steps of max(eta / s, the plan's own step), s the spread at the row's place (AdaFlow, Hu et al. 2024).

    A row has a time of its own, never behind the plan's, and is not called again once it is at the data: `num_steps`
    is the most calls of a row, not their number. eta -> 0 is Euler; where s < eta one step is left. For deployment
    and rollouts without scored steps, since such a chain has no grid to score again.
    """

    needs_spread = True
    ROUNDING = 1e-6

    def __init__(self, eta: Positive = 0.1):
        if eta <= 0:
            raise ValueError(f"eta must be positive, got {eta}; euler takes every step of the plan")
        self.eta = eta

    def __call__(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, cond: Cond, memory: Memory
    ) -> tuple[Tensor, Memory]:
        reached = t if memory is None else memory
        rows = (reached < 1).nonzero()[:, 0]  # waits for a GPU: what is saved is worth more
        if not len(rows):
            return x, reached
        now, plan = reached[rows], (t_next - t)[rows]
        told = velocity(x[rows], now, torch.zeros_like(now), cond.index(rows))
        then = now + torch.maximum(self.eta * torch.exp(-told[:, -1]), plan)
        then = torch.where((then > 1 - self.ROUNDING) | (t_next[rows] >= 1), torch.ones_like(then), then)
        moved = x[rows] + expand(then - now, x) * told[:, :-1].reshape(len(rows), *x.shape[1:])
        return x.index_copy(0, rows, moved), reached.index_copy(0, rows, then)
