"""Anchor: keep the deployed action of a fine-tuned policy near that of the pre-trained one.

    weight x E |a_theta(x_0, obs) - a_ref(x_0, obs)|^2, a mean over rows and action entries

Both are noise-free chains from the SAME x_0 ~ N(0, 1), so the root of the expectation bounds the 2-Wasserstein
distance of the two action laws from above (ReinFlow's W2 regulariser, Zhang et al. 2025; DPPO's BC loss).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlflow.flow.gaussian import reduce_events
from rlflow.flow.noise import Key, noise
from rlflow.flow.policy import FlowPolicy
from rlflow.types import Cond

CondOf = Callable[[Tensor], Cond]


@dataclass(frozen=True)
class Anchor:
    """x_0 and the reference's action for each row of an iteration, (N, *D) each."""

    policy: FlowPolicy
    x_0: Tensor
    action: Tensor

    @staticmethod
    @torch.no_grad()
    def at(policy: FlowPolicy, cond_of: CondOf, row_ids: Tensor, key: Key, rows_per_call: int) -> Anchor:
        """Drawn by (key, row_ids (N,)); the 'ref' weights act once per iteration."""
        x_0 = noise(key, row_ids.cpu(), policy.event_shape, policy.dtype, policy.device)
        rows = torch.arange(len(x_0), device=policy.device)
        with policy.using("ref"):
            action = torch.cat([_act(policy, cond_of(part), x_0[part]) for part in rows.split(rows_per_call)])
        return Anchor(policy, x_0, action)

    def distance(self, cond: Cond, rows: Tensor) -> Tensor:
        """(M,) mean squared difference of the live weights' actions; gradient through every step of their chain."""
        return reduce_events((_act(self.policy, cond, self.x_0[rows]) - self.action[rows]).square(), "mean")


def _act(policy: FlowPolicy, cond: Cond, x_0: Tensor) -> Tensor:
    return policy.squash(policy.sample(cond, x_0=x_0).final)
