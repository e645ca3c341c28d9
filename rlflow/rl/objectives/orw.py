"""Reward-weighted matching: ORW-CFM-W2 (Fan et al. 2025), and with a critic of half-finished samples AC-Flow.

    L = w |v - u|^2,    w = exp(beta clip(A)) / mean over samples,    u = x_1 - x_0

at the stored draws of the policy's own samples, A their rewards by whatever `advantage` says. `algorithm.kl.beta` is
the W2 anchor alpha |v - v_ref|^2. Without it the optimum is the velocity of the law tilted by w, so n rounds tilt by
exp(n beta A): the collapse is built in, the anchor bounds it,

    v* = (E[w u | x_t] + alpha v_ref) / (E[w | x_t] + alpha)

With `control_variate`, which is ours, |v - u|^2 keeps the weight w - 1 and v is drawn to the velocity that sampled,

    L = (w - 1) |v - u|^2 + |v - v_old|^2

whose gradient has the same expectation, since v_old = E[u | x_t] under the policy's own samples, less their noise:
equal rewards move nothing, where plain matching retrains the policy on itself.

The equations of AC-Flow's paper could not be read, those of its weight are ours: A less V(x_t, t, cond) stands in the
exponent. A baseline of x_t cancels from E[w u | x_t] / E[w | x_t], so without the anchor it changes no optimum; with
the soft value V = log E[exp(beta A) | x_t] / beta the mean of w is 1 at every x_t, and the anchor equally strong.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlflow.flow.policy import FlowPolicy
from rlflow.parallel import dist
from rlflow.ranges import LearningRate, Positive, Size
from rlflow.rl.batch import Batch, Pairs
from rlflow.rl.likelihoods.base import Likelihood, Score
from rlflow.rl.likelihoods.cfm import CFMLikelihood
from rlflow.rl.masked import weighted_sum
from rlflow.rl.objectives.awm import velocity_distance
from rlflow.rl.objectives.base import Losses, Objective
from rlflow.rl.path_critic import PathCriticLearner
from rlflow.types import Evidence


class ORW(Objective):
    """`beta` is the inverse temperature of the weights, of advantages clipped at +-`clip`."""

    def __init__(
        self, likelihood: Likelihood, beta: Positive = 1.0, clip: Positive = 5.0, control_variate: bool = False
    ):
        super().__init__(likelihood)
        if likelihood.scores_steps or likelihood.joint:
            raise ValueError(
                f"{type(self).__name__} weighs single matching draws: set likelihood={{name: cfm, joint: false}}"
            )
        if control_variate and not _plain(likelihood):
            raise ValueError(
                "control_variate sets |v - u|^2 against |v - v_old|^2, a mean over numbers: set likelihood.supervise="
                "velocity, reduce=mean and normalize=false with it"
            )
        self.beta, self.clip, self.control_variate = beta, clip, control_variate

    def prepare(self, batch: Batch) -> None:
        """Weights of mean 1 over all ranks, so that the learning rate means the same for every beta."""
        w = (self.beta * self.exponent(batch).clamp(-self.clip, self.clip)).exp()
        alive = batch.row_weight.unsqueeze(1).expand_as(w)
        sums = torch.stack([weighted_sum(w, alive), weighted_sum(w.square(), alive), alive.sum()])
        first, second, count = dist.all_sum(sums.double()).clamp(min=1e-12).unbind()
        batch.advantage = (w.double() * count / first).to(w.dtype)
        batch.metrics["policy/effective_frac"] = float(first.square() / second / count)

    def exponent(self, batch: Batch) -> Tensor:
        """(N, R) before beta."""
        return batch.advantage.expand(-1, batch.num_columns)

    def loss(self, score: Score, evidence: Evidence, advantage: Tensor) -> Losses:
        """The matching loss of each draw, weighed by what `prepare` has made of the advantages."""
        if not self.control_variate:
            return Losses(-advantage * score.log_prob, {})
        return Losses((1 - advantage) * score.log_prob + velocity_distance(score, evidence), {})


def _plain(likelihood: Likelihood) -> bool:
    """Whether a score is minus the mean squared error of the velocity."""
    if not isinstance(likelihood, CFMLikelihood):
        return False
    return likelihood.supervise == "velocity" and likelihood.reduce == "mean" and not likelihood.normalize


class ACFlow(ORW):
    """`value` is regressed on what it has to be at the draws' own (x_t, t), by one step beside each of the policy."""

    has_critic = True
    critic: PathCriticLearner

    def __init__(
        self,
        likelihood: Likelihood,
        beta: Positive = 1.0,
        clip: Positive = 5.0,
        control_variate: bool = False,
        value: Literal["soft", "mean"] = "soft",
        critic_lr: LearningRate = 1e-3,
        critic_width: Size = 128,
    ):
        super().__init__(likelihood, beta, clip, control_variate)
        self.value, self.critic_lr, self.critic_width = value, critic_lr, critic_width

    def attach(self, policy: FlowPolicy) -> None:
        """Make the critic, which is 0 at first: the first iteration is ORW's."""
        self.critic = PathCriticLearner(policy, self.likelihood, self.critic_lr, self.critic_width)

    def exponent(self, batch: Batch) -> Tensor:
        """What is left of the advantages when the critic's share is taken off; they are kept for the fit."""
        self.target = batch.advantage.clamp(-self.clip, self.clip)
        return batch.advantage - self.critic.values(batch)

    def learn(self, batch: Batch, rows: Tensor) -> dict[str, Tensor]:
        """Towards E[A | x_t], or for the soft value exp(beta V) towards E[exp(beta A) | x_t]."""
        evidence, target = batch.evidence_of(Pairs(rows, None)), self.target[rows]
        weight = batch.pair_weight(Pairs(rows, None), joint=False)
        total = dist.all_sum(weight.sum()).clamp(min=1e-12)
        with torch.no_grad():  # the critic trains only itself
            cond = batch.cond(rows)

        def loss() -> Tensor:
            v = self.critic.of(cond, evidence)
            if self.value == "mean":
                return weighted_sum((v - target).square(), weight) / total
            return weighted_sum(((self.beta * v).exp() - (self.beta * target).exp()).square(), weight) / total

        return {"critic/loss": self.critic.step(loss)}
