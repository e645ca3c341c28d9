"""Advantage-weighted matching (AWM; Xue et al. 2025): the matching loss of each draw, weighed by its advantage.

    L = max(-A r, -A clip(r, 1 - low, 1 + high)) + trust |v - v_old|^2,    r = exp(D_old - D)

D is the matching loss of a draw, so that at v = v_old the gradient is A grad D, and where A < 0 the exponential lets go
of what became unlikely, which A D would drive off for ever. The release's clip is 1. What holds the policy is the
distance of velocities; the release takes it to a fast average of the weights, at one more pass, ours to the weights
that sampled, whose velocities are recorded anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlflow.flow.gaussian import reduce_events
from rlflow.ranges import NotNegative, Positive
from rlflow.rl.likelihoods.base import Likelihood, Score
from rlflow.rl.objectives.base import Losses
from rlflow.rl.objectives.clip import Clip
from rlflow.types import Evidence


class AWM(Clip):
    """`trust` weighs the squared distance of velocities, a mean over numbers, to the weights that sampled."""

    def __init__(
        self, likelihood: Likelihood, low: Positive = 1.0, high: Positive | None = None, trust: NotNegative = 1.0
    ):
        super().__init__(likelihood, low, high)
        if likelihood.scores_steps or likelihood.joint:
            raise ValueError("awm weighs single matching draws: set likelihood={name: cfm, joint: false} with it")
        self.trust = trust

    def loss(self, score: Score, evidence: Evidence, advantage: Tensor) -> Losses:
        """As of the clipped surrogate, plus the distance, which is logged too."""
        out, distance = super().loss(score, evidence, advantage), velocity_distance(score, evidence)
        return Losses(out.pairs + self.trust * distance, out.logged | {"policy/velocity_shift": distance.detach()})


def velocity_distance(score: Score, evidence: Evidence) -> Tensor:
    """(M, R) |v - v_old|^2 of draws, a mean over numbers; actions that were not carried out do not count."""
    square = (score.dist.mean - evidence.old_mean).square()
    square = square if evidence.counts is None else torch.where(evidence.counts, square, 0.0)
    return reduce_events(square, "mean", batch_dims=2)
