"""Which of a policy's samples is deployed: the only one made, or the best of N by a scorer.

Best-of-N needs no training, and its sample has no density that is known: it belongs to evaluation and deployment, and
rollouts refuse it. A scorer is a callable handed in, so nothing here knows rewards or critics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlflow.flow.noise import Key
from rlflow.flow.steps import Plan
from rlflow.ranges import Size
from rlflow.types import Cond

if TYPE_CHECKING:
    from rlflow.flow.policy import FlowPolicy

Scorer = Callable[[Tensor, Any], Tensor]
"""(samples (N, n, *D) as an environment receives them, what the N rows were asked) -> scores (N, n); more is better,
nan is no score. What was asked: raw observations of robots, {column: N values} of the prompt table for images."""

APART = 2**32
"""Between the row numbers of two samples of one row: no evaluation has as many rows."""


def handed(policy: FlowPolicy, final: Tensor, cond: Cond) -> Tensor:
    """What leaves the policy for chains at `cond` that end in `final` (N, *D): pictures decoded, actions as sent.

    Those of a network with units of its own its environment decodes.
    """
    sample = policy.squash(final)
    return sample if policy.field.unguided.decodes_actions else policy.field.act(sample, cond)


class Select:
    """The plain deployment sampler: one sample of each row."""

    num: int = 1
    """Samples made of each row."""

    @property
    def about(self) -> str:
        """What is done, in words; nothing of the usual."""
        return ""

    def __call__(
        self,
        policy: FlowPolicy,
        cond: Cond,
        asked: Any,
        plan: Plan,
        key: Key,
        row_ids: Tensor,
        x_0: Tensor | None = None,
    ) -> Tensor:
        """(N, *D) as an environment receives it, of the rows of `cond`; `x_0` (N, *D) in place of drawn starts."""
        chain = policy.sample(cond, plan, key=key, row_ids=row_ids, x_0=x_0)
        return handed(policy, chain.final, cond)

    def act(self, policy: FlowPolicy, obs: Any, plan: Plan, key: Key, row_ids: Tensor) -> Tensor:
        """(N, *D) as an environment receives it, at raw observations (N, ...) on the policy's device."""
        return self(policy, policy.encode(obs), obs, plan, key, row_ids)


class BestOf(Select):
    """Of `num` samples of each row the one that `scorer` likes best, the first of equals; `num` times the network rows.

    The first sample is that of the plain sampler, and fewer samples are the first ones of more: a row's score never
    falls as `num` grows. A sample without a score is taken only where none has one.
    """

    def __init__(self, num: Size, scorer: Scorer, called: str = ""):
        self.num, self.scorer, self.called = num, scorer, called

    @property
    def about(self) -> str:
        """best of 4 by clip_score"""
        return f"best of {self.num}" + (f" by {self.called}" if self.called else "")

    def __call__(
        self,
        policy: FlowPolicy,
        cond: Cond,
        asked: Any,
        plan: Plan,
        key: Key,
        row_ids: Tensor,
        x_0: Tensor | None = None,
    ) -> Tensor:
        """(N, *D); the samples' starts are drawn, so `x_0` is refused."""
        if x_0 is not None:
            raise ValueError("samples from one given start are all the same: leave x_0 out, or select nothing")
        apart = torch.arange(self.num) * APART
        ids = (row_ids.cpu().unsqueeze(1) + apart).flatten()
        chain = policy.sample(cond, plan, key=key, row_ids=ids, copies=self.num)
        made = handed(policy, chain.final, cond.repeat(self.num)).unflatten(0, (-1, self.num))
        scores = self.scorer(made, asked).to(made.device)
        if scores.shape != made.shape[:2]:
            raise ValueError(f"the scorer gave {tuple(scores.shape)} scores for {tuple(made.shape[:2])} samples")
        best = torch.where(scores.isnan(), -torch.inf, scores).argmax(1)
        return made[torch.arange(len(made), device=made.device), best]
