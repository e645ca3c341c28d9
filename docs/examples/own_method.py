"""A method of your own in a file of your own: how the chain is noised, and later what is optimised.

    python docs/examples/own_method.py RUN [key=value ...]

A method is a few exchangeable parts. This one brings its own kernel and takes the rest from Flow-GRPO-Fast.
"""

import math
import sys

import torch
from torch import Tensor

import rlflow as rf
from rlflow.flow.kernels import MarginalSDE


class SineSDE(MarginalSDE):
    """g = a sin(pi t): noise in the middle of the path, none at either end.

    The base class adds the score correction that keeps the marginals, and gives density, KL and kappa: only `g` is
    ours. t and t_next come shaped to broadcast against x.
    """

    def __init__(self, a: float = 0.7):
        super().__init__()
        if a <= 0:  # errors at construction name the fix; the recipe's path is put before them
            raise ValueError(f"SineSDE needs a > 0, got {a}; without noise there is nothing to score")
        self.a = a

    def g(self, t: Tensor, t_next: Tensor) -> Tensor:
        """Diffusion coefficient at the middle of the step: at t = 0 itself there would be none to score."""
        return self.a * torch.sin(math.pi * (t + t_next) / 2)


# The objective: what is optimised over (score, evidence, advantage) joins here and is named in the settings below.


def main(run: str, *more: str) -> None:
    """Two minutes of the embedded text-to-image model; `rlflow doctor` checks a method before a long run."""
    settings = [
        "policy.kernel={name: 'own_method:SineSDE', a: 0.7}",  # file:class, so trust_code below
        "steps={name: random_window, size: 3, stop: 5}",  # which steps are noisy and scored
        *("train.minutes=2", "eval.num=284", "eval.every=10"),
    ]
    metrics = rf.Trainer("t2i_flow_grpo_fast", run, overrides=[*settings, *more], trust_code=True).fit()
    print("strict accuracy:", metrics["eval/heldout/strict"])


if __name__ == "__main__":
    main(*sys.argv[1:])
