"""Losses and statistics of a ratio, as pure functions; every mean is weighted, with a global denominator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from rlflow.flow.gaussian import Gaussian, Reduce, reduce_events
from rlflow.rl.likelihoods.base import Score
from rlflow.types import Evidence

KLKind = Literal["exact", "velocity", "released"]


def weighted_sum(value: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight * value where a masked entry may be nan (`where` before arithmetic: 0 * nan is nan)."""
    return (torch.where(weight > 0, value, 0.0) * weight).sum()


Clip = float | Tensor
"""One range, or one for each pair, broadcastable to the log-ratio."""


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip_low: Clip, clip_high: Clip) -> Tensor:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), elementwise (PPO, Schulman et al. 2017)."""
    ratio = log_ratio.exp()
    low, high = (cast("Tensor", bound) for bound in (1 - clip_low, 1 + clip_high))  # clamp takes two floats as well
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))


def simple_surrogate(log_ratio: Tensor, advantage: Tensor, clip_low: Clip, clip_high: Clip) -> Tensor:
    """-(A r - |A| (r - 1)^2 / (2 eps)), eps = high for A > 0, else low; least at r = 1 + sign(A) eps (SPO, Xie 2024).

    The gradient never vanishes: a ratio that went too far is pulled back, where PPO's clip lets it be.
    """
    ratio, up = log_ratio.exp(), (advantage > 0).to(advantage)
    eps = clip_high * up + clip_low * (1 - up)
    return -advantage * ratio + advantage.abs() * (ratio - 1).square() / (2 * eps)


def asymmetric_surrogate(log_ratio: Tensor, advantage: Tensor, clip_low: Clip, clip_high: Clip) -> Tensor:
    """PPO's clip where A >= 0, SPO where A < 0 (ASPO of FPO++): what became less likely is not driven off for good."""
    args = (log_ratio, advantage, clip_low, clip_high)
    return torch.where(advantage >= 0, clipped_surrogate(*args), simple_surrogate(*args))


Surrogate = Callable[[Tensor, Tensor, Clip, Clip], Tensor]
"""(log-ratio (M, R), advantage broadcastable to it, clip_low, clip_high) -> losses (M, R)."""

TRUST_REGIONS: dict[str, Surrogate] = {
    "clip": clipped_surrogate,
    "spo": simple_surrogate,
    "aspo": asymmetric_surrogate,
}
"""By the names of `algorithm.trust_region`."""


def clip_fraction(log_ratio: Tensor, advantage: Tensor, clip_low: Clip, clip_high: Clip) -> Tensor:
    """1 where the ratio is beyond the trust region (there PPO's gradient is cut, SPO's turns back), elementwise."""
    ratio = log_ratio.exp()
    return ((advantage > 0) & (ratio > 1 + clip_high) | (advantage < 0) & (ratio < 1 - clip_low)).float()


@dataclass(frozen=True)
class PerStep:
    """Each denoising step's own advantage and clip (DPPO, Ren et al. 2024); step k of K, 0 the noisiest.

    A_k = A gamma^(K-1-k);  clip_k = base + (top - base)(e^(3k/(K-1)) - 1)/(e^3 - 1), base None: top everywhere.
    """

    gamma: float = 1.0
    base: float | None = None

    @property
    def active(self) -> bool:
        """False when steps are treated alike."""
        return self.gamma != 1.0 or self.base is not None

    def discount(self, k: Tensor, num_steps: int) -> Tensor:
        """gamma^(K-1-k) for floating k of any shape."""
        return self.gamma ** (num_steps - 1 - k)

    def clip(self, k: Tensor, num_steps: int, top: float) -> Clip:
        """From base at k = 0 to top at the last step; the only step of K = 1 is the last."""
        if self.base is None:
            return top
        share = k / (num_steps - 1) if num_steps > 1 else torch.ones_like(k)
        return self.base + (top - self.base) * torch.expm1(3 * share) / math.expm1(3.0)


def step_index(t: Tensor, grid: Tensor) -> Tensor:
    """k of the steps that begin at t = grid[k]; any plan's columns, whichever steps it scores."""
    return torch.bucketize(t, grid[1:].to(t), right=True)


def mean_shift(score: Score, evidence: Evidence, reduce: Reduce) -> Tensor:
    """|mean - old_mean|^2 / (2 S^2) per pair (N, R), reduced over event dims."""
    z = (score.dist.mean - evidence.old_mean) / evidence.old_std
    z = z if evidence.counts is None else torch.where(evidence.counts, z, 0.0)
    return reduce_events(0.5 * z.square(), reduce, batch_dims=2)


def guard_log_ratio(log_ratio: Tensor, score: Score, evidence: Evidence, reduce: Reduce) -> Tensor:
    """GRPO-Guard: (log r + |dmu|^2 / (2 S^2)) S, which has mean 0 at every step (Wang et al. 2025)."""
    std = evidence.old_std.flatten(2).mean(-1)
    return (log_ratio + mean_shift(score, evidence, reduce)) * std


def reference_kl(kind: KLKind, dist: Gaussian, evidence: Evidence, reduce: Reduce, gain: Tensor | None) -> Tensor:
    """KL to the reference per pair (N, R).

    'exact': the Gaussian KL of the step in nats. 'velocity': |v - v_ref|^2 = |dmu|^2 / gain^2.
    'released': Flow-GRPO's |dmu|^2 / (2 g^2) with g^2 = S^2 / dt, i.e. dt times the exact KL.
    """
    if evidence.ref_mean is None or evidence.ref_std is None:
        raise ValueError("no reference was recorded: ask the learner for a kl term before the rollout is scored")
    if kind == "velocity":
        assert gain is not None
        return reduce_events((dist.mean - evidence.ref_mean).square(), reduce, batch_dims=2) / gain.square()
    exact = dist.kl(Gaussian(evidence.ref_mean, evidence.ref_std), reduce, batch_dims=2)
    return exact if kind == "exact" else exact * (evidence.t_next - evidence.t)
