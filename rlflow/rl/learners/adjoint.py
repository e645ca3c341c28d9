"""Adjoint Matching (Domingo-Enrich et al. 2024) in discrete time: the policy whose samples have the reference's law,
tilted by exp(scale R). Minimised is -scale E[R(x_K)] + KL(chain || reference's chain), by regression:

    a_K = scale dR/dx_K,   a_k = (d mu_ref / dx)(x_k)^T a_{k+1}                 the lean adjoint: of the reference alone
    L   = sum_k |mu(x_k) - mu_ref(x_k) - S_k^2 a_{k+1}|^2 / (2 S_k^2)           over the steps with noise

with means mu and std S_k of the chain's own steps, and a step's adjoint that of where it ARRIVES: that makes a linear
reward on Gaussians exact at every number of steps. With a_k, that of where it departs, a tenth and more is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlflow.flow.gaussian import Gaussian, reduce_events
from rlflow.flow.marginal import start_correlation
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import Plan, Steps
from rlflow.ranges import NotNegative
from rlflow.rl.learners.reward_gradient import Samples, Through, check_whole_steps

MEMORY = 0.02
"""Correlation of x_0 and x_K up to which a chain counts as memoryless."""


@dataclass(frozen=True)
class Adjoint(Through):
    """Adjoint Matching: the law of the un-tuned policy's noisy chain, tilted by exp(scale R)."""

    scale: NotNegative = 10.0
    needs_reference: ClassVar[bool] = True

    def kept(self, num_steps: int) -> int:
        return num_steps

    def check(self, policy: FlowPolicy, steps: Steps) -> None:
        """Refused is a chain that remembers its start, whose optimum is another law."""
        grid = policy.grid(policy.num_steps)
        plan = steps(0, grid, torch.zeros(1, dtype=torch.long))
        noisy = plan.noisy.nonzero()[:, -1].tolist()
        if plan.per_row or not noisy or noisy != list(steps.possible(policy.num_steps)):
            raise ValueError(f"adjoint needs the same noisy steps always, not {type(steps).__name__}: all_but_last")
        check_whole_steps(policy)
        shapes = policy.event_shape, policy.field.num_features
        correlation = start_correlation(policy.kernel, policy.solver, plan, *shapes)
        if correlation > MEMORY or policy.kernel.learns_std:
            raise ValueError(
                f"{type(policy.kernel).__name__} on these steps is not memoryless: samples of a Gaussian correlate "
                f"{correlation:.2f} with their start, whose own value would bend the tilted law: use "
                "policy.kernel={name: ancestral, eta: 1.0}, or {name: flow_sde, a: 1.4142} on 5 steps or more"
            )

    def passes(self, policy: FlowPolicy, plan: Plan) -> tuple[int, int]:
        noisy = int(plan.noisy.sum())
        return noisy + (plan.num_steps - noisy) * policy.solver.calls, noisy

    def backward(self, samples: Samples) -> Tensor:
        """The loss is a mean over the event's numbers, a sum over steps."""
        with samples.policy.using("ref"):
            means, pulls = lean(samples, self.scale)
        total = samples.share.new_zeros(())
        for k, noisy in enumerate(samples.noisy):
            if noisy:
                x, cond = samples.path[:, k], samples.encode()
                found = samples.policy.transition(x, samples.time(k), samples.time(k + 1), cond)
                loss = (samples.share * matching(found, means[k], pulls[k])).sum()
                loss.backward()
                total = total + loss.detach()
        return total


def lean(samples: Samples, scale: float) -> tuple[list[Tensor], list[Tensor]]:
    """mu(x_k) and a_{k+1} of every step, (M, *D) each, of the policy in place: the reference."""
    means, pulls = [], []
    _, pull = samples.pull(samples.path[:, -1], torch.full_like(samples.share, scale))
    for k in reversed(range(len(samples.noisy))):
        x = samples.path[:, k].detach().requires_grad_()
        mean = samples.mean(k, x)
        means.append(mean.detach())
        pulls.append(pull)
        (pull,) = torch.autograd.grad(mean, x, pull)
    return means[::-1], pulls[::-1]


def matching(found: Gaussian, ref_mean: Tensor, pull: Tensor) -> Tensor:
    """|mu - mu_ref - S^2 a|^2 / (2 S^2) (M,), a mean over numbers, with a the adjoint at the step's arrival."""
    return reduce_events(((found.mean - ref_mean) / found.std - found.std * pull).square() / 2, "mean")
