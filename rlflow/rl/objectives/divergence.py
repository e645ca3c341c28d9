"""Flow-DPPO (2026): a trust region in nats. A pair is left out where its step has gone too far and would go further.

    L = -A r m,    m = 0 where KL(step || old step) > delta and A (r - 1) > 0, else 1

The KL is that of the two Gaussians, exact and free, in nats per number of the event whatever `likelihood.reduce` is; a
ratio of one sample is a noisy estimate of it, whose scale is another one for each kernel. So one delta serves them all.
"""

from __future__ import annotations

from torch import Tensor

from rlflow.flow.gaussian import Gaussian
from rlflow.ranges import Positive
from rlflow.rl.likelihoods.base import Likelihood, Score
from rlflow.rl.objectives.base import Losses, Objective
from rlflow.types import Evidence


def divergence_mask(log_ratio: Tensor, advantage: Tensor, kl: Tensor, delta: float) -> Tensor:
    """1 where a pair contributes: within delta nats, or on its way back; elementwise."""
    return ((kl <= delta) | (advantage * log_ratio <= 0)).to(log_ratio)


class FlowDPPO(Objective):
    """`delta` is in nats per number of the event; the paper's are of the order of 1e-5."""

    def __init__(self, likelihood: Likelihood, delta: Positive = 1e-5):
        super().__init__(likelihood)
        if not likelihood.scores_steps or likelihood.joint:
            raise ValueError(
                "flow_dppo holds the exact KL of each denoising step: set likelihood={name: chain, joint: false}"
            )
        self.delta = delta

    def loss(self, score: Score, evidence: Evidence, advantage: Tensor) -> Losses:
        """Logged: the ratio, the share of pairs left out, and the KL in nats per number."""
        log_ratio = self.likelihood.log_ratio(score.log_prob, evidence)
        kl = step_kl(score, evidence)
        mask = divergence_mask(log_ratio.detach(), advantage, kl, self.delta)
        ratio = log_ratio.exp()
        return Losses(
            -advantage * ratio * mask,
            {"policy/ratio_mean": ratio.detach(), "policy/clip_frac": 1 - mask, "policy/step_kl": kl},
        )


def step_kl(score: Score, evidence: Evidence) -> Tensor:
    """(M, R) exact KL of each step to the one that sampled, nats per number; no gradient."""
    dist = Gaussian(score.dist.mean.detach(), score.dist.std.detach())
    return dist.kl(Gaussian(evidence.old_mean, evidence.old_std), "mean", batch_dims=2)
