"""Transition kernels: p(x_next | x) of one denoising step, from a velocity.

All are affine in (x, v) with a Gaussian of explicit std. The marginal family adds noise and the
matching score correction (Song et al. 2021; stochastic interpolants, Albergo et al. 2023):

    mean = x + (v + g^2 / 2 * score) dt,     std = g sqrt(dt),     score = (t v - x) / (1 - t)

A new SDE overrides `g`. There is no ODE kernel: steps without noise belong to a Solver.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.flow import path
from rlflow.flow.gaussian import Gaussian
from rlflow.flow.path import expand
from rlflow.ranges import Level, Size


class Kernel(nn.Module, ABC):
    """Base: subclasses implement `step` in at least float32."""

    velocity: ClassVar[Literal["instantaneous", "step"]] = "instantaneous"
    """Which velocity `transition` asks the field for: dt = 0, or dt = t_next - t."""
    marginal_preserving: ClassVar[bool] = False
    """True when exact velocities give the data law at t = 1 as K grows."""

    @property
    def learns_std(self) -> bool:
        """True when the noise has parameters that train."""
        return any(p.requires_grad for p in self.parameters())

    @abstractmethod
    def step(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, hidden: Tensor | None) -> Gaussian:
        """The transition; t, t_next are already broadcastable against x."""

    def forward(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, hidden: Tensor | None = None) -> Gaussian:
        """Gaussian over x_next for x, v (N, *D), t, t_next (N,), hidden (N, F) or None."""
        x, v = path.at_least_float(x), path.at_least_float(v)
        t, t_next = expand(t, x).to(x.dtype), expand(t_next, x).to(x.dtype)
        return self.step(x, v, t, t_next, hidden)

    def gain(self, t: Tensor, t_next: Tensor) -> Tensor:
        """c = dmean / dv (N,), a scalar per step because every kernel is affine in v."""
        zero = torch.zeros_like(t).unsqueeze(-1)
        at = [self(zero, zero + v, t, t_next, None).mean for v in (0.0, 1.0)]
        return (at[1] - at[0]).reshape(len(t), -1)[:, 0]

    def velocity_of(self, mean: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """The v (N, *D) whose step from x has this mean: the inverse of an affine map."""
        return (mean - self(x, torch.zeros_like(x), t, t_next, None).mean) / expand(self.gain(t, t_next), x)

    def min_std(self, t: Tensor, t_next: Tensor) -> Tensor:
        """The smallest std (N,) the kernel can give at these times."""
        zero = torch.zeros_like(t).unsqueeze(-1)
        return self(zero, zero, t, t_next, None).std.reshape(len(t), -1)[:, 0]

    def max_std(self, t: Tensor, t_next: Tensor) -> Tensor:
        """The largest std (N,) the kernel can give at these times throughout the run; here the std is fixed."""
        return self.min_std(t, t_next)

    def set_progress(self, progress: float) -> None:
        """Share of the run that is done, in [0, 1], for a kernel with a schedule; fixed within an iteration."""

    def kappa(self, t: Tensor, t_next: Tensor) -> Tensor:
        """|dmean/dv| / std (N,): how an error of the network enters the log-ratio; inf where std = 0."""
        return self.gain(t, t_next).abs() / self.min_std(t, t_next)


def annealed(progress: float, hold: float, final: float) -> float:
    """Share of the noise at `progress`: 1 up to `hold` of the run, then a half cosine down to `final` at its end."""
    done = max(0.0, progress - hold) / max(1 - hold, 1e-9)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def _check_schedule(name: str, hold: float, final: float) -> None:
    if not 0 <= hold <= 1 or not 0 < final <= 1:
        raise ValueError(f"{name} needs hold in [0, 1] and final in (0, 1], got {hold} and {final}")


class MarginalSDE(Kernel):
    """The family above; any g >= 0 keeps the marginals as dt -> 0, but g must vanish at point-like data."""

    marginal_preserving = True

    @abstractmethod
    def g(self, t: Tensor, t_next: Tensor) -> Tensor:
        """Diffusion coefficient at t, shaped like t."""

    def step(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, hidden: Tensor | None) -> Gaussian:
        dt, g = t_next - t, self.g(t, t_next)
        score = (t * v - x) / (1 - t)
        return Gaussian(x + (v + 0.5 * g.square() * score) * dt, g * dt.sqrt())


class FlowSDE(MarginalSDE):
    """g = a sqrt((1 - t) / t), with t_next for t in the denominator at t = 0 (Flow-GRPO, Liu et al. 2025).

    With `hold` < 1 the noise is annealed (pi_RL, Chen et al. 2025): a for that share of the run, then down to
    `final` a at its end.
    """

    def __init__(self, a: Level = 0.7, hold: float = 1.0, final: float = 0.5):
        super().__init__()
        if a <= 0:
            raise ValueError(f"FlowSDE needs a > 0, got {a}; without noise there is nothing to score")
        _check_schedule("FlowSDE", hold, final)
        self.start, self.hold, self.final = a, hold, final
        self.set_progress(0.0)

    def g(self, t: Tensor, t_next: Tensor) -> Tensor:
        return self.a * ((1 - t) / torch.where(t > 0, t, t_next)).sqrt()

    def set_progress(self, progress: float) -> None:
        """Move a; hold = 1 never does."""
        self.a = self.start * annealed(progress, self.hold, self.final)


class ConstantSDE(MarginalSDE):
    """g = eta everywhere (DanceGRPO, Xue et al. 2025); unstable on point-like data when eta^2 K > 2."""

    def __init__(self, eta: Level = 0.3):
        super().__init__()
        if eta <= 0:
            raise ValueError(f"ConstantSDE needs eta > 0, got {eta}; without noise there is nothing to score")
        self.eta = eta

    def g(self, t: Tensor, t_next: Tensor) -> Tensor:
        return torch.full_like(t, self.eta)


def _check_unit(name: str, eta: float) -> float:
    if not 0 < eta <= 1:
        raise ValueError(f"{name} needs 0 < eta <= 1, got {eta}: its noise share is not monotonic above 1")
    return eta


def _mix(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, noise_weight: Tensor) -> Tensor:
    """t' x1_hat + noise_weight x0_hat."""
    return t_next * (x + (1 - t) * v) + noise_weight * (x - t * v)


class CPS(Kernel):
    """Coefficients-preserving sampling: the noise share keeps its coefficient 1 - t' (Wang et al. 2025).

    mean = t' x1_hat + (1 - t') cos(pi eta / 2) x0_hat, std = (1 - t') sin(pi eta / 2); not marginal preserving.
    """

    def __init__(self, eta: float = 0.7):
        super().__init__()
        self.angle = _check_unit("CPS", eta) * math.pi / 2

    def step(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, hidden: Tensor | None) -> Gaussian:
        left = 1 - t_next
        return Gaussian(_mix(x, v, t, t_next, left * math.cos(self.angle)), left * math.sin(self.angle))


class Ancestral(Kernel):
    """DDIM-eta in flow coordinates (ours, after Song et al. 2020): eta = 1 is the posterior q(x_t' | x_t, x1_hat).

    S = eta (1 - t') sqrt(1 - r^2), r = t (1 - t') / (t' (1 - t)); mean = t' x1_hat + sqrt((1-t')^2 - S^2) x0_hat.
    """

    velocity = "step"
    marginal_preserving = True

    def __init__(self, eta: float = 0.7):
        super().__init__()
        self.eta = _check_unit("Ancestral", eta)

    def step(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, hidden: Tensor | None) -> Gaussian:
        left = 1 - t_next
        r = t * left / (t_next * (1 - t))
        std = self.eta * left * (1 - r.square()).clamp(min=0).sqrt()
        keep = (left.square() - std.square()).clamp(min=0).sqrt()
        return Gaussian(_mix(x, v, t, t_next, keep), std)


class Overshoot(Kernel):
    """Step too far along the ODE, then back by noise (Hu et al. 2025, the sampler of AMO without its attention).

    t_o = min(t' + c (t' - t), 1), x_o = x + (t_o - t) v, and x_o is scaled to the signal t' and filled up with noise to
    the spread 1 - t': mean = t' x1_hat + k x0_hat, std^2 = (1 - t')^2 - k^2, k = t' (1 - t_o) / t_o. For small steps
    this is FlowSDE with a = sqrt(2 c).
    """

    marginal_preserving = True

    def __init__(self, c: Level = 0.5):
        super().__init__()
        if c <= 0:
            raise ValueError(f"Overshoot needs c > 0, got {c}; a step that ends where it should has no noise to score")
        self.c = c

    def step(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, hidden: Tensor | None) -> Gaussian:
        too_far = (t_next + self.c * (t_next - t)).clamp(max=1)
        keep = t_next * (1 - too_far) / too_far
        std = ((1 - t_next).square() - keep.square()).clamp(min=0).sqrt()
        return Gaussian(_mix(x, v, t, t_next, keep), std)


class LearnedNoise(Kernel):
    """mean = x + v dt, std = exp(lo + (hi - lo)(tanh(net) + 1) / 2) per event dim (ReinFlow, Flow-Noise, SAC Flow).

    No sqrt(dt) and no drift correction: exploration noise, removed at deployment, not marginal
    preserving by design. The net reads time and condition features, never x.

    The upper bound is `std_max` for the share `hold` of the run, then falls along a half cosine until only
    the share `final` of the gap to `std_min` is left (ReinFlow, Zhang et al. 2025: hold .35, final .7).
    """

    velocity = "step"

    def __init__(
        self,
        num_features: int,
        event_shape: tuple[int, ...],
        std_min: Level = 0.08,
        std_max: Level = 0.16,
        width: Size = 64,
        hold: float = 1.0,
        final: float = 0.7,
    ):
        super().__init__()
        if not 0 < std_min < std_max:
            raise ValueError(f"LearnedNoise needs 0 < std_min < std_max, got {std_min} and {std_max}")
        _check_schedule("LearnedNoise", hold, final)
        self.num_features, self.event_shape = num_features, tuple(event_shape)
        self.std_min, self.std_max, self.hold, self.final = std_min, std_max, hold, final
        self.lo = math.log(std_min)
        self.hi = torch.zeros(
            (), dtype=torch.float64
        )  # a number that is read where it stands, as what runs is recorded
        self.set_progress(0.0)
        last = nn.Linear(width, math.prod(event_shape))
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        self.net = nn.Sequential(nn.Linear(num_features + 1, width), nn.SiLU(), last)

    def step(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, hidden: Tensor | None) -> Gaussian:
        if hidden is None:
            raise ValueError("LearnedNoise reads the condition features: pass hidden (N, F)")
        first = self.net[0]
        assert isinstance(first, nn.Linear)
        inputs = torch.cat([hidden.to(x.dtype), t.reshape(len(t), 1)], -1).to(first.weight.dtype)
        level = (torch.tanh(path.at_least_float(self.net(inputs))) + 1) / 2
        std = (self.lo + (self.hi - self.lo) * level).exp().to(x.dtype)
        return Gaussian(x + v * (t_next - t), std.reshape(-1, *self.event_shape))

    def set_progress(self, progress: float) -> None:
        """Move the upper bound; hold = 1 never does."""
        share = annealed(progress, self.hold, self.final)
        self.hi.fill_(math.log(self.std_min + share * (self.std_max - self.std_min)))

    def gain(self, t: Tensor, t_next: Tensor) -> Tensor:
        return t_next - t

    def velocity_of(self, mean: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        return (mean - x) / expand(t_next - t, x)

    def min_std(self, t: Tensor, t_next: Tensor) -> Tensor:
        return torch.full_like(t, math.exp(self.lo))

    def max_std(self, t: Tensor, t_next: Tensor) -> Tensor:
        share = 1.0 if self.hold >= 1 else self.final
        return torch.full_like(t, self.std_min + share * (self.std_max - self.std_min))
