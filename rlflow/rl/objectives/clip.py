"""The clipped surrogate of PPO and what else holds a ratio near 1: SPO, and ASPO of FPO++.

    L = max(-A r, -A clip(r, 1 - low, 1 + high)),    r = exp(score - old)

of each step, draw or, where the likelihood is joint, row. DPPO's terms (Ren et al. 2024) give step k of K, 0 the
noisiest, its own advantage and clip:

    A_k = A gamma^(K-1-k),    clip_k = base + (top - base)(e^(3k/(K-1)) - 1)/(e^3 - 1),    top = low, high
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from rlflow.flow.policy import FlowPolicy
from rlflow.ranges import Positive, Share
from rlflow.rl.likelihoods.base import Likelihood, Score
from rlflow.rl.objectives.base import Losses, Objective
from rlflow.types import Evidence

Bound = float | Tensor
"""One range, or one for each pair, broadcastable to the log-ratio."""


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip_low: Bound, clip_high: Bound) -> Tensor:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), elementwise (PPO, Schulman et al. 2017)."""
    ratio = log_ratio.exp()
    low, high = (cast("Tensor", bound) for bound in (1 - clip_low, 1 + clip_high))  # clamp takes two floats as well
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))


def simple_surrogate(log_ratio: Tensor, advantage: Tensor, clip_low: Bound, clip_high: Bound) -> Tensor:
    """-(A r - |A| (r - 1)^2 / (2 eps)), eps = high for A > 0, else low; least at r = 1 + sign(A) eps (SPO, Xie 2024).

    The gradient never vanishes: a ratio that went too far is pulled back, where PPO's clip lets it be.
    """
    ratio, up = log_ratio.exp(), (advantage > 0).to(advantage)
    eps = clip_high * up + clip_low * (1 - up)
    return -advantage * ratio + advantage.abs() * (ratio - 1).square() / (2 * eps)


def asymmetric_surrogate(log_ratio: Tensor, advantage: Tensor, clip_low: Bound, clip_high: Bound) -> Tensor:
    """PPO's clip where A >= 0, SPO where A < 0 (ASPO of FPO++): what became less likely is not driven off for good."""
    args = (log_ratio, advantage, clip_low, clip_high)
    return torch.where(advantage >= 0, clipped_surrogate(*args), simple_surrogate(*args))


def clip_fraction(log_ratio: Tensor, advantage: Tensor, clip_low: Bound, clip_high: Bound) -> Tensor:
    """1 where the ratio is beyond the trust region (there PPO's gradient is cut, SPO's turns back), elementwise."""
    ratio = log_ratio.exp()
    return ((advantage > 0) & (ratio > 1 + clip_high) | (advantage < 0) & (ratio < 1 - clip_low)).float()


def step_index(t: Tensor, grid: Tensor) -> Tensor:
    """k of the steps that begin at t = grid[k]; any plan's columns, whichever steps it scores."""
    return torch.bucketize(t, grid[1:].to(t), right=True)


def step_clip(k: Tensor, num_steps: int, base: float | None, top: float) -> Bound:
    """From `base` at k = 0 to `top` at the last step; the only step of K = 1 is the last; base None: top everywhere."""
    if base is None:
        return top
    share = k / (num_steps - 1) if num_steps > 1 else torch.ones_like(k)
    return base + (top - base) * torch.expm1(3 * share) / math.expm1(3.0)


class Clip(Objective):
    """The clipped surrogate (PPO, Schulman et al. 2017).

    `high` None is `low`. `target_kl` ends an iteration's epochs when the estimate E[r - 1 - log r] of an epoch's last
    optimiser steps passes it: the KL of whatever is clipped, in nats under likelihood.reduce=sum, nats per number under
    mean. `gamma` counts each earlier denoising step that much less, `base` is the clip of the noisiest one, growing to
    `low` and `high` at the last.
    """

    fixed = True

    def __init__(
        self,
        likelihood: Likelihood,
        low: Positive = 2e-3,
        high: Positive | None = None,
        target_kl: Positive | None = None,
        gamma: Share = 1.0,
        base: Positive | None = None,
    ):
        super().__init__(likelihood)
        self.low, self.high, self.target_kl = low, low if high is None else high, target_kl
        self.gamma, self.base = gamma, base
        if self._by_step and not likelihood.scores_steps:
            raise ValueError(
                f"{type(likelihood).__name__} has no denoising steps to discount or clip: leave out gamma and base"
            )
        if self._by_step and likelihood.joint:
            raise ValueError(
                "a joint ratio has no single steps to discount or clip: use likelihood.joint=false with gamma and base"
            )

    @property
    def _by_step(self) -> bool:
        return self.gamma != 1.0 or self.base is not None

    @property
    def largest_log_ratio(self) -> float:
        """log(1 + high)."""
        return math.log1p(self.high)

    def attach(self, policy: FlowPolicy) -> None:
        """Keep the denoising grid, which tells a pair's step."""
        self.grid, self.num_steps = policy.grid(policy.num_steps), policy.num_steps

    def loss(self, score: Score, evidence: Evidence, advantage: Tensor) -> Losses:
        """Logged: the ratio, where it is beyond its bounds, and the KL estimate."""
        log_ratio = self.likelihood.log_ratio(score.log_prob, evidence)
        raw = log_ratio.detach()
        log_ratio = self.held(log_ratio, score, evidence)
        advantage, low, high = self._of_steps(advantage, evidence)
        held = log_ratio.detach()
        return Losses(
            self.surrogate(log_ratio, advantage, low, high),
            {
                "policy/ratio_mean": held.exp(),
                "policy/clip_frac": clip_fraction(held, advantage, low, high),
                "policy/approx_kl": torch.expm1(raw) - raw,
            },
        )

    def held(self, log_ratio: Tensor, score: Score, evidence: Evidence) -> Tensor:
        """The log-ratio that is held near 0."""
        return log_ratio

    def surrogate(self, log_ratio: Tensor, advantage: Tensor, low: Bound, high: Bound) -> Tensor:
        """Losses of log-ratios (M, R) or (M, 1)."""
        return clipped_surrogate(log_ratio, advantage, low, high)

    def _of_steps(self, advantage: Tensor, evidence: Evidence) -> tuple[Tensor, Bound, Bound]:
        """Advantage (M, 1) or (M, R), and the clip range, of the denoising steps that the columns stand for."""
        if not self._by_step:
            return advantage, self.low, self.high
        k = step_index(evidence.t, self.grid).to(advantage)
        low, high = (step_clip(k, self.num_steps, self.base, top) for top in (self.low, self.high))
        return advantage * self.gamma ** (self.num_steps - 1 - k), low, high

    def stop(self, mean: Callable[[str], float]) -> bool:
        """The same on every rank, because its input is a global sum."""
        return self.target_kl is not None and mean("policy/approx_kl") > self.target_kl


class SPO(Clip):
    """A quadratic penalty in place of the clip, which pulls back what went too far (Xie 2024)."""

    def surrogate(self, log_ratio: Tensor, advantage: Tensor, low: Bound, high: Bound) -> Tensor:
        """Pulled back on both sides."""
        return simple_surrogate(log_ratio, advantage, low, high)


class ASPO(Clip):
    """PPO's clip where A >= 0, SPO where A < 0 (FPO++ 2026)."""

    def surrogate(self, log_ratio: Tensor, advantage: Tensor, low: Bound, high: Bound) -> Tensor:
        """Clipped where A >= 0, pulled back elsewhere."""
        return asymmetric_surrogate(log_ratio, advantage, low, high)
