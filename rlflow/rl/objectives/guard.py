"""GRPO-Guard (Wang et al. 2025): log-ratios of mean 0 and of one scale, whatever the noise of their step.

log r_guard = (log r + |dmu|^2 / (2 S^2)) S,    L / dt
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlflow.flow.gaussian import Reduce, reduce_events
from rlflow.flow.policy import FlowPolicy
from rlflow.ranges import Positive
from rlflow.rl.likelihoods.base import Likelihood, Score
from rlflow.rl.objectives.base import Losses
from rlflow.rl.objectives.clip import Clip
from rlflow.types import Evidence


def mean_shift(score: Score, evidence: Evidence, reduce: Reduce) -> Tensor:
    """|mean - old_mean|^2 / (2 S^2) per pair (N, R), reduced over event dims."""
    z = (score.dist.mean - evidence.old_mean) / evidence.old_std
    z = z if evidence.counts is None else torch.where(evidence.counts, z, 0.0)
    return reduce_events(0.5 * z.square(), reduce, batch_dims=2)


def guard_log_ratio(log_ratio: Tensor, score: Score, evidence: Evidence, reduce: Reduce) -> Tensor:
    """GRPO-Guard: (log r + |dmu|^2 / (2 S^2)) S, which has mean 0 at every step (Wang et al. 2025)."""
    std = evidence.old_std.flatten(2).mean(-1)
    return (log_ratio + mean_shift(score, evidence, reduce)) * std


class Guard(Clip):
    """The clipped surrogate of centred log-ratios of single denoising steps, whose loss is divided by their length."""

    def __init__(
        self,
        likelihood: Likelihood,
        low: Positive = 2e-3,
        high: Positive | None = None,
        target_kl: Positive | None = None,
    ):
        super().__init__(likelihood, low, high, target_kl)
        if not likelihood.scores_steps:
            raise ValueError(
                f"GRPO-Guard re-scales each denoising step's ratio, and {type(likelihood).__name__} has none: "
                "use objective=clip"
            )
        if likelihood.joint:
            raise ValueError("GRPO-Guard re-scales each denoising step's ratio: use likelihood.joint=false with it")

    def attach(self, policy: FlowPolicy) -> None:
        """ValueError for a kernel that learns its std."""
        super().attach(policy)
        if policy.kernel.learns_std:
            raise ValueError(
                f"GRPO-Guard centres log-ratios of a fixed std, which {type(policy.kernel).__name__} learns: "
                "use objective=clip or kernel=flow_sde"
            )

    def held(self, log_ratio: Tensor, score: Score, evidence: Evidence) -> Tensor:
        """Centred, and of one scale."""
        return guard_log_ratio(log_ratio, score, evidence, self.likelihood.reduce)

    def loss(self, score: Score, evidence: Evidence, advantage: Tensor) -> Losses:
        """As of the clipped surrogate, over the length of each step."""
        out = super().loss(score, evidence, advantage)
        return out._replace(pairs=out.pairs / (evidence.t_next - evidence.t))
