"""A method of your own in a file of your own: how the chain is noised, and what is optimised.

    python docs/examples/own_method.py RUN [key=value ...]

A method is a few exchangeable parts. This one brings its own kernel and objective, the rest is Flow-GRPO-Fast's.
"""

import math
import sys

import torch
from torch import Tensor

import rlflow as rf
from rlflow.flow.kernels import MarginalSDE
from rlflow.ranges import Level, Positive
from rlflow.rl.likelihoods.base import Likelihood, Score
from rlflow.rl.objectives.base import Losses, Objective
from rlflow.types import Evidence


class SineSDE(MarginalSDE):
    """g = a sin(pi t). The base class adds the score correction that keeps the marginals, density, KL and kappa."""

    def __init__(self, a: Level = 0.7):  # the annotation is the range: a=0 is refused with the setting's path
        super().__init__()
        self.a = a

    def g(self, t: Tensor, t_next: Tensor) -> Tensor:
        """Diffusion coefficient at the middle of the step: at t = 0 itself there would be none to score."""
        return self.a * torch.sin(math.pi * (t + t_next) / 2)


class Proximal(Objective):
    """-A log r + (log r)^2 / (2 width), r = exp(score - old): least at log r = width A, with no clip."""

    def __init__(self, likelihood: Likelihood, width: Positive = 2e-3):
        super().__init__(likelihood)
        self.width = width

    def loss(self, score: Score, evidence: Evidence, advantage: Tensor) -> Losses:
        """Of each pair of sample and scored step; masks, means over processes, KL and averages are the learner's."""
        log_ratio = self.likelihood.log_ratio(score.log_prob, evidence)
        pairs = log_ratio.square() / (2 * self.width) - advantage * log_ratio
        return Losses(pairs, {"policy/log_ratio": log_ratio.detach()})  # what is to be logged, beside the loss


def main(run: str, *more: str) -> None:
    """Two minutes of the embedded model; `rlflow doctor` checks a method before a long run."""
    settings = [
        "policy.kernel={name: 'own_method:SineSDE', a: 0.7}",  # file:class, so trust_code below
        "algorithm.objective=own_method:Proximal",
        *("steps={name: random_window, size: 3, stop: 5}", "train.minutes=2", "eval.num=284", "eval.every=10", *more),
    ]
    rf.Trainer("t2i_flow_grpo_fast", run, overrides=settings, trust_code=True).fit()  # prints before -> after


if __name__ == "__main__":
    main(*sys.argv[1:])
