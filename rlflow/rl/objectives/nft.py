"""DiffusionNFT (Zheng et al. 2025): reward enters the forward process, as good and bad halves of a matching loss.

For a sample x_1 with advantage A and draws (x_0, t), with u = x_1 - x_0 and x_t = (1 - t) x_0 + t x_1,

    r   = clamp(A / (2 c) + 1/2, 0, 1)                                       (c: the advantage's clip)
    v+  = b v + (1 - b) v_old,        v- = (1 + b) v_old - b v
    L   = c [ r D(v+) + (1 - r) D(v-) ] / b,      D(w) = mean e^2 / sg(mean |e|),   e = (1 - t) (w - u)

where e is the error of the sample that w predicts, x_t + (1 - t) w, and sg stops the gradient. No density, no noisy
step, no ratio: samples may come from any solver. `old` are the weights that draw the samples, an average that follows
the live ones. At v = v_old the gradient is A times that of D(v), for every b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlflow.flow.policy import FlowPolicy
from rlflow.ranges import BelowOne, Natural, NotNegative, Positive
from rlflow.rl.likelihoods.base import Likelihood, Score
from rlflow.rl.objectives.base import Losses, Objective
from rlflow.types import Evidence

SMALLEST = 1e-5
"""Of the error that a branch is divided by."""


class NFT(Objective):
    """b is `beta`, c `clip`; after n optimiser steps the sampling weights keep a share of themselves.

    min((n - `old_flat`) x `old_rate`, `old_max`), 0 before `old_flat`, taken once an iteration. The release's second
    schedule is old_flat 75, old_rate .0075, old_max .999.
    """

    sample_with = "old"
    weight_sets = ("old",)

    def __init__(
        self,
        likelihood: Likelihood,
        beta: Positive = 1.0,
        clip: Positive = 5.0,
        old_rate: NotNegative = 0.001,
        old_max: BelowOne = 0.5,
        old_flat: Natural = 0,
    ):
        super().__init__(likelihood)
        if likelihood.scores_steps or likelihood.joint:
            raise ValueError("nft is a loss of matching draws: set likelihood={name: cfm, joint: false} with it")
        self.beta, self.clip, self.old_rate, self.old_max, self.old_flat = beta, clip, old_rate, old_max, old_flat

    def loss(self, score: Score, evidence: Evidence, advantage: Tensor) -> Losses:
        """From the live velocities, which are the means of the draws' distributions."""
        return Losses(self.of(score.dist.mean, evidence, advantage), {})

    def of(self, v: Tensor, evidence: Evidence, advantage: Tensor) -> Tensor:
        """(M, R) from the live velocity v (M, R, *D) at the evidence's draws and advantages (M, 1)."""
        good = (advantage / (2 * self.clip) + 0.5).clamp(0, 1)
        ahead = self.beta * (v - evidence.old_mean)
        up, down = (_error(evidence.old_mean + sign * ahead, evidence) for sign in (1, -1))
        return self.clip / self.beta * (good * up + (1 - good) * down)

    def after(self, policy: FlowPolicy, steps: int) -> None:
        """The sampling weights take their step towards the live ones."""
        policy.weights.blend("old", min(self.old_rate * max(0, steps - self.old_flat), self.old_max))


def _error(velocity: Tensor, evidence: Evidence) -> Tensor:
    """(M, R) D of the predicted sample; actions of a chunk that were not carried out have no error."""
    left = (1 - evidence.t)[(..., *[None] * (velocity.ndim - 2))]
    error = left * (velocity - (evidence.x_next - evidence.x))
    error = (error if evidence.counts is None else torch.where(evidence.counts, error, 0.0)).flatten(2)
    scale = error.detach().abs().mean(-1).clamp(min=SMALLEST)
    return error.square().mean(-1) / scale
