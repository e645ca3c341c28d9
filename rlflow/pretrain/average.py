"""Average velocities learnt without a teacher: MeanFlow, SplitMeanFlow, AlphaFlow.

u(x, t, dt) is the mean velocity of the flow through x at t over [t, t + dt]: x + dt u is where it leads, in one step.
At dt = 0 it is the velocity v, which flow matching teaches; for the rest each of three identities gives a target,
right where u is, in our direction (t = 0 noise, the end t + dt fixed):

    MeanFlow       v + dt du/dt,  du/dt along (dx, dt, d dt) = (v, 1, -1)         Geng et al. 2025
    SplitMeanFlow  s u(x, t, m) + (1 - s) u(x + m u(x, t, m), t + m, dt - m),  m = s dt          Guo et al. 2025
    AlphaFlow      a v + (1 - a) u(x + d v, t + d, dt - d),  d = a dt,  loss / a              Zhang et al. 2025

with x_1 - x_0 in the place of v. A target carries no gradient. AlphaFlow is matching along whole trajectories at a = 1,
and tends to MeanFlow as a -> 0. SplitMeanFlow at s = 1/2 is Shortcut's.

Whose answers a target is made of decides whether it can be learnt. MeanFlow's is unbounded: u' = v + dt D u - u, D a
derivative along the flow with eigenvalues i w, falls for every w if D u is that of the weights that train; if it lags
behind by n steps, one eigenvalue is about sqrt(i w / n), which grows. So derivatives take the live weights, and the
sums of SplitMeanFlow, which amplify nothing, the averaged ones.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlflow.flow.field import VelocityField
from rlflow.flow.matching import MatchingLoss, Scheduled
from rlflow.flow.path import at_least_float, expand, interpolate
from rlflow.types import Cond

NOISE = 4.0
"""Standard deviations that noise is taken to reach, where ends are clamped."""


@dataclass(frozen=True)
class Span:
    """N steps of the path that averages are learnt over: x (N, *D) at t (N,), dt (N,), and x_1 - x_0 (N, *D)."""

    x: Tensor
    t: Tensor
    dt: Tensor
    v: Tensor
    cond: Cond


@dataclass(frozen=True)
class TargetGuidance:
    """Guidance inside the target: v <- w v + k u(x, t, 0 | c) + (1 - w - k) u(x, t, 0 | null), w = scale, k = mix.

    Where u is right it is v guided by w / (1 - k); rows whose condition was dropped stay as they are. `released` is
    what MP1's code does: it hides no condition, so null is c, the mean of the target that of v, its variance w^2 times
    as large, and nothing is guided.
    """

    scale: float = 2.0
    mix: float = 0.0
    released: bool = False

    def __post_init__(self) -> None:
        if self.scale <= 0 or not 0 <= self.mix < 1:
            raise ValueError(f"guidance needs scale > 0 and 0 <= mix < 1, got {self.scale} and {self.mix}")

    @torch.no_grad()
    def velocity(self, teacher: VelocityField, x: Tensor, t: Tensor, v: Tensor, cond: Cond) -> Tensor:
        """(N, *D) in the place of v (N, *D), at x (N, *D) and t (N,)."""
        still = torch.zeros_like(t)
        known = at_least_float(teacher(x, t, still, cond)) if self.mix or self.released else v
        null = known if self.released else at_least_float(teacher(x, t, still, teacher.null(cond)))
        return self.scale * v + self.mix * known + (1 - self.scale - self.mix) * null


@dataclass(frozen=True)
class AverageLoss(Scheduled):
    """The first `share` of the rows learn an average over [t, t'] from the times of two rows, the others match v.

    `bound`: data lie in [-bound, bound], and a target leads no further than the path from noise of 4 std to there;
    None is no limit. Before the share `warm_up` of the training all rows match. `power` divides a row's loss by
    (itself + .001)^power, published with .5 to 1: the optimum is then a mean that counts far data less. `guidance`
    is learnt with the averages, so one pass at inference is guided.
    """

    lagging: ClassVar[bool] = False
    """Targets are of the weight average in the place of the live weights."""
    share: float = 0.5
    bound: float | None = None
    warm_up: float = 0.1
    power: float = 0.0
    guidance: TargetGuidance | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie above 0 and at most at 1, got {self.share}")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up must lie in [0, 1), got {self.warm_up}")
        if self.bound is not None and self.bound <= 0:
            raise ValueError(f"bound must be positive, got {self.bound}; None is no limit")
        if self.power < 0:
            raise ValueError(f"power must not be negative, got {self.power}")

    def at(self, progress: float, teacher: VelocityField) -> MatchingLoss:
        """The loss after a share `progress` of the training; `teacher` is the weight average, for what may lag."""

        def loss(field: VelocityField, x_1: Tensor, cond: Cond, x_0: Tensor, t: Tensor) -> Tensor:
            if not field.uses_dt:
                raise ValueError(f"{type(field).__name__} does not read dt: build it with average=True")
            return self.errors(
                progress, teacher if self.lagging else field, field, at_least_float(x_1), cond, at_least_float(x_0), t
            )

        return loss

    def errors(
        self,
        progress: float,
        teacher: VelocityField,
        field: VelocityField,
        x_1: Tensor,
        cond: Cond,
        x_0: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Weighted squared errors (N,), a mean over the event; the rows of averages come first."""
        num = round(self.share * len(t)) if progress >= self.warm_up else 0
        start, dt = steps(t, num)
        x, v = interpolate(x_0, x_1, start), x_1 - x_0
        if self.guidance is not None:
            v = self.guidance.velocity(teacher, x, start, v, cond)
        rows = torch.arange(num, device=t.device)
        target = v
        if num:
            span = Span(x[:num], start[:num], dt[:num], v[:num], cond.index(rows))
            with torch.no_grad():
                target = torch.cat([self._clamped(span, self.target(progress, teacher, span)), v[num:]])
        error = (at_least_float(field(x, start, dt, cond)) - target).square().flatten(1).mean(1)
        weight = torch.ones_like(error)
        weight[:num] *= self.weight(progress)
        return error * weight / (error.detach() + 1e-3) ** self.power

    def _clamped(self, span: Span, target: Tensor) -> Tensor:
        """The target, or the nearest that leads no further than data and noise reach at its end."""
        if self.bound is None:
            return target
        end = expand(span.t + span.dt, span.x)
        reach, dt = (1 - end) * NOISE + end * self.bound, expand(span.dt, span.x).clamp(min=1e-6)
        return target.clamp((-reach - span.x) / dt, (reach - span.x) / dt)

    @abstractmethod
    def target(self, progress: float, teacher: VelocityField, span: Span) -> Tensor:
        """(N, *D), equal in expectation to the field's answer where that is right."""

    def weight(self, progress: float) -> float:
        """Of the rows that learn an average."""
        return 1.0


@dataclass(frozen=True)
class MeanFlow(AverageLoss):
    """Forward-mode derivative of the network: twice the cost of a pass, and no fused attention."""

    def target(self, progress: float, teacher: VelocityField, span: Span) -> Tensor:
        """v + dt du/dt, the end fixed."""
        return by_derivative(teacher, span)


@dataclass(frozen=True)
class SplitMeanFlow(AverageLoss):
    """Two passes of the teacher, no derivative; where to split is read from the low digits of t, even in [0, 1)."""

    lagging = True

    def target(self, progress: float, teacher: VelocityField, span: Span) -> Tensor:
        """The way to a middle and from there on."""
        return self.split(teacher, span, low_digits(span.t))

    @staticmethod
    def split(teacher: VelocityField, span: Span, where: Tensor) -> Tensor:
        """The target (N, *D) with the middle after a share `where` (N,) of each step."""
        m = where * span.dt
        first = at_least_float(teacher(span.x, span.t, m, span.cond))
        middle = span.x + expand(m, span.x) * first
        second = at_least_float(teacher(middle, span.t + m, span.dt - m, span.cond))
        return torch.lerp(second, first, expand(where, first))


@dataclass(frozen=True)
class AlphaFlow(AverageLoss):
    """From a = 1 to 0 along a sigmoid over the training, set to 1 or 0 within `clamp` of them; at 0 it is MeanFlow."""

    warm_up: float = 0.0
    steepness: float = 12.0
    clamp: float = 0.05

    def alpha(self, progress: float) -> float:
        """1 at the beginning, 1/2 in the middle, 0 at the end."""
        a = 1 / (1 + math.exp(self.steepness * (progress - 0.5)))
        return 0.0 if a < self.clamp else 1.0 if a > 1 - self.clamp else a

    def target(self, progress: float, teacher: VelocityField, span: Span) -> Tensor:
        """Along v for the first share a of the step, by the teacher from there on."""
        a = self.alpha(progress)
        return self.blend(teacher, span, a) if a else by_derivative(teacher, span)

    @staticmethod
    def blend(teacher: VelocityField, span: Span, a: float) -> Tensor:
        """a v + (1 - a) u(x + a dt v, t + a dt, (1 - a) dt)."""
        d = a * span.dt
        rest = teacher(span.x + expand(d, span.x) * span.v, span.t + d, span.dt - d, span.cond)
        return a * span.v + (1 - a) * at_least_float(rest)

    def weight(self, progress: float) -> float:
        """1 / a: the gradient shrinks with a."""
        return 1 / (self.alpha(progress) or 1.0)


def by_derivative(teacher: VelocityField, span: Span) -> Tensor:
    """MeanFlow's target (N, *D)."""

    def velocity(x: Tensor, t: Tensor, dt: Tensor) -> Tensor:
        return at_least_float(teacher(x, t, dt, span.cond))

    one = torch.ones_like(span.t)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode rule
        slope = jvp(velocity, (span.x, span.t, span.dt), (span.v, one, -one))[1]
    return span.v + expand(span.dt, span.x) * slope


def steps(t: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """(start (N,), dt (N,)): of the first `num` rows from the earlier to the later of two rows' times."""
    start, end = torch.minimum(t, t.roll(1)), torch.maximum(t, t.roll(1))
    over = torch.arange(len(t), device=t.device) < num
    return torch.where(over, start, t), torch.where(over, end - start, 0)


def low_digits(t: Tensor) -> Tensor:
    """(N,) in [0, 1), as good as drawn for times that are: what is left of t below 1 / 1024."""
    return (t * 1024).frac()
