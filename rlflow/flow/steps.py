"""Step selection: which denoising steps are stochastic and scored.

A Steps is a pure function (iteration, grid, row_ids) -> Plan, so that resume is exact and every rank
agrees. Each row has the same number R of scored steps; a plan is never empty and its grid ends at t = 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlflow.flow.grid import between
from rlflow.flow.noise import Key, generator, noise
from rlflow.ranges import Seed


@dataclass(frozen=True)
class Plan:
    """Times (K' + 1,) or (N, K' + 1) in float64 on the CPU, and which of the K' steps are scored.

    `noisy` (default: the scored ones) are the steps that sample from the kernel; the others belong to
    the solver. Scored steps are always noisy.
    """

    t: Tensor
    scored: Tensor
    noisy: Tensor

    @property
    def per_row(self) -> bool:
        """True when rows differ in how they are sampled (scoring alone may differ freely)."""
        return self.t.ndim == 2 or self.noisy.ndim == 2

    @property
    def num_steps(self) -> int:
        """K'."""
        return self.scored.shape[-1]

    @property
    def num_scored(self) -> int:
        """R, equal for all rows."""
        return int(self.scored.reshape(-1, self.num_steps)[0].sum())

    def first_noisy(self) -> int:
        """Index of the first step with noise in any row; K' when there is none."""
        hit = self.noisy.reshape(-1, self.num_steps).any(0).nonzero()
        return int(hit[0]) if len(hit) else self.num_steps


def deterministic(grid: Tensor) -> Plan:
    """No step scored: deployment."""
    return _plan(grid, range(0))


def _plan(grid: Tensor, indices: range) -> Plan:
    scored = torch.zeros(len(grid) - 1, dtype=torch.bool)
    scored[list(indices)] = True
    return Plan(grid, scored, scored)


class Steps(ABC):
    """Base of all selections."""

    mixed_rows: ClassVar[bool] = False
    """True when one step is noisy for some rows and an ODE step for others (needs the Euler solver)."""

    @abstractmethod
    def __call__(self, iteration: int, grid: Tensor, row_ids: Tensor) -> Plan:
        """Pure: the same arguments give the same plan."""

    @abstractmethod
    def possible(self, num_steps: int) -> range:
        """Every step that can ever be scored, for the checks at construction."""


def _usable(num_steps: int, skip_last: int, need: int, name: str) -> int:
    usable = num_steps - skip_last
    if skip_last < 0:
        raise ValueError(f"{name} needs skip_last >= 0, got {skip_last}")
    if usable < need:
        raise ValueError(
            f"{name} needs {need} usable steps but {num_steps} steps less skip_last={skip_last} leave {usable}: "
            "raise policy.num_steps or lower the window"
        )
    return usable


@dataclass(frozen=True)
class NoSteps(Steps):
    """Nothing is scored (matching losses, reward gradients, deployment)."""

    def __call__(self, iteration: int, grid: Tensor, row_ids: Tensor) -> Plan:
        return deterministic(grid)

    def possible(self, num_steps: int) -> range:
        return range(0)


@dataclass(frozen=True)
class All(Steps):
    """Every step."""

    def __call__(self, iteration: int, grid: Tensor, row_ids: Tensor) -> Plan:
        return _plan(grid, self.possible(len(grid) - 1))

    def possible(self, num_steps: int) -> range:
        return range(num_steps)


@dataclass(frozen=True)
class AllButLast(Steps):
    """Every step but the last `skip_last`, where CPS and Ancestral have no or hardly any noise."""

    skip_last: int = 1

    def __call__(self, iteration: int, grid: Tensor, row_ids: Tensor) -> Plan:
        return _plan(grid, self.possible(len(grid) - 1))

    def possible(self, num_steps: int) -> range:
        return range(_usable(num_steps, self.skip_last, 1, "all_but_last"))


@dataclass(frozen=True)
class LastN(Steps):
    """The last n steps, less `skip_last` at the very end (DPPO fine-tunes the last denoising steps)."""

    n: int = 3
    skip_last: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"last_n needs n >= 1, got {self.n}; use steps=none to score nothing")

    def __call__(self, iteration: int, grid: Tensor, row_ids: Tensor) -> Plan:
        return _plan(grid, self.possible(len(grid) - 1))

    def possible(self, num_steps: int) -> range:
        usable = _usable(num_steps, self.skip_last, self.n, "last_n")
        return range(usable - self.n, usable)


@dataclass(frozen=True)
class Window(Steps):
    """MixGRPO's moving window of `size` steps (Li et al. 2025); the other steps are an ODE.

    The start s moves through 0 .. K - skip_last - size by `stride`, after a number of iterations that
    `strategy` sets: 'progressive' `every`; 'random' draws s anew each `every` iterations;
    'decay' int(I (1 - p) + p (I // 4)) with I = every, p = s / K; 'exp_decay'
    ceil(I exp(-0.1 relu(s - 13))). At the end it starts over (`roll_back`) or stays. `compress` < 1
    is MixGRPO-Flash: the steps after the window are re-gridded to max(1, int((K - last) compress) - 1), even
    before the grid's shift as in the release, ending at t = 1; stride 0 freezes the window (Flash*).
    """

    size: int = 4
    every: int = 25
    stride: int = 1
    strategy: Literal["progressive", "random", "decay", "exp_decay"] = "progressive"
    roll_back: bool = True
    skip_last: int = 2
    compress: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.every < 1 or self.stride < 0:
            raise ValueError("a window needs size >= 1, every >= 1, stride >= 0")
        if self.compress is not None and not 0 < self.compress <= 1:
            raise ValueError(f"compress must be in (0, 1], got {self.compress}")

    def __call__(self, iteration: int, grid: Tensor, row_ids: Tensor) -> Plan:
        start = self.start(iteration, len(grid) - 1)
        plan = _plan(grid, range(start, start + self.size))
        return plan if self.compress is None else self._regrid(plan, start + self.size - 1)

    def possible(self, num_steps: int) -> range:
        starts = self._starts(num_steps)
        return range(self.size if self.stride == 0 else starts[-1] + self.size)

    def start(self, iteration: int, num_steps: int) -> int:
        """First step of the window at `iteration`."""
        starts = self._starts(num_steps)
        if self.strategy == "random":
            g = generator("window", self.seed, iteration // self.every)
            return starts[int(torch.randint(len(starts), (1,), generator=g))]
        lengths = [self._interval(s, num_steps) for s in starts]
        total = sum(lengths)
        if iteration >= total:
            if not self.roll_back:
                return starts[-1]
            iteration %= total
        for s, length in zip(starts, lengths, strict=True):
            if iteration < length:
                return s
            iteration -= length
        raise AssertionError("unreachable: the remainder is below the total")

    def _starts(self, num_steps: int) -> list[int]:
        usable = _usable(num_steps, self.skip_last, self.size, "window")
        return list(range(0, usable - self.size + 1, self.stride)) if self.stride else [0]

    def _interval(self, start: int, num_steps: int) -> int:
        if self.strategy == "decay":
            p = start / num_steps
            return max(1, int(self.every * (1 - p) + p * (self.every // 4)))
        if self.strategy == "exp_decay":
            return math.ceil(self.every * math.exp(-0.1 * max(0, start - 13)))
        return self.every

    def _regrid(self, plan: Plan, last: int) -> Plan:
        assert self.compress is not None
        if last + 1 == plan.num_steps:
            return plan  # the window ends at the data: nothing is left to re-grid
        num_after = max(1, int((plan.num_steps - last) * self.compress) - 1)
        index = torch.linspace(last + 1, plan.num_steps, num_after + 1, dtype=torch.float64)
        t = torch.cat([plan.t[: last + 2], between(plan.t, index[1:])])
        scored = torch.zeros(len(t) - 1, dtype=torch.bool)
        scored[: last + 1] = plan.scored[: last + 1]
        return Plan(t, scored, scored)


@dataclass(frozen=True)
class RandomWindow(Steps):
    """A window of `size` at a start drawn each iteration from 0 .. stop - size (Flow-GRPO-Fast: stop = K // 2)."""

    size: int = 3
    stop: int | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"random_window needs size >= 1, got {self.size}; use steps=none to score nothing")

    def __call__(self, iteration: int, grid: Tensor, row_ids: Tensor) -> Plan:
        num = len(self.possible(len(grid) - 1))
        start = int(
            torch.randint(num - self.size + 1, (1,), generator=generator("random_window", self.seed, iteration))
        )
        return _plan(grid, range(start, start + self.size))

    def possible(self, num_steps: int) -> range:
        stop = max(self.size, num_steps // 2) if self.stop is None else self.stop
        if not self.size <= stop <= num_steps:
            raise ValueError(f"random_window of size {self.size} does not fit in steps 0..{stop} of {num_steps}")
        return range(stop)


def _per_row_choice(name: str, seed: int, iteration: int, row_ids: Tensor, num: int, choose: int) -> Tensor:
    """`choose` distinct of `num` per row, (N, num) bool; a function of the row id, not of the batch."""
    order = noise(Key(seed, name, iteration), row_ids.cpu(), (num,)).argsort(-1)
    return torch.zeros(len(row_ids), num, dtype=torch.bool).scatter_(1, order[:, :choose], True)


@dataclass(frozen=True)
class OneRandom(Steps):
    """One random step per row (pi_RL Flow-SDE)."""

    mixed_rows = True
    skip_last: int = 1
    seed: Seed = 0

    def __call__(self, iteration: int, grid: Tensor, row_ids: Tensor) -> Plan:
        num = len(self.possible(len(grid) - 1))
        chosen = _per_row_choice("one_random", self.seed, iteration, row_ids, num, 1)
        scored = torch.nn.functional.pad(chosen, (0, len(grid) - 1 - num))
        return Plan(grid, scored, scored)

    def possible(self, num_steps: int) -> range:
        return range(_usable(num_steps, self.skip_last, 1, "one_random"))


@dataclass(frozen=True)
class Fraction(Steps):
    """DanceGRPO: all usable steps are stochastic, a random share of them (per row) is scored (Xue et al. 2025)."""

    fraction: float = 0.6
    skip_last: int = 1
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")

    def __call__(self, iteration: int, grid: Tensor, row_ids: Tensor) -> Plan:
        num = len(self.possible(len(grid) - 1))
        choose = max(1, int(num * self.fraction))
        chosen = _per_row_choice("fraction", self.seed, iteration, row_ids, num, choose)
        scored = torch.nn.functional.pad(chosen, (0, len(grid) - 1 - num))
        return Plan(grid, scored, noisy=_plan(grid, range(num)).noisy)

    def possible(self, num_steps: int) -> range:
        return range(_usable(num_steps, self.skip_last, 1, "fraction"))
