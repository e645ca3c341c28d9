"""Losses and statistics of a ratio, as pure functions; every mean is weighted, with a global denominator."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlflow.flow.gaussian import Gaussian, Reduce, reduce_events
from rlflow.rl.likelihood import Score
from rlflow.types import Evidence

KLKind = Literal["exact", "velocity", "released"]


def weighted_sum(value: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight * value where a masked entry may be nan (`where` before arithmetic: 0 * nan is nan)."""
    return (torch.where(weight > 0, value, 0.0) * weight).sum()


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), elementwise (PPO, Schulman et al. 2017)."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))


def clip_fraction(log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """1 where the surrogate's gradient is cut, elementwise."""
    ratio = log_ratio.exp()
    return ((advantage > 0) & (ratio > 1 + clip_high) | (advantage < 0) & (ratio < 1 - clip_low)).float()


def mean_shift(score: Score, evidence: Evidence, reduce: Reduce) -> Tensor:
    """|mean - old_mean|^2 / (2 S^2) per pair (N, R), reduced over event dims."""
    z = (score.dist.mean - evidence.old_mean) / evidence.old_std
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
