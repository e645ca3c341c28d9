"""Likelihoods: evidence recorded while sampling, scored again at update time, R columns per row.

A log-ratio is `score - old`. Both come from the same function of the same stored pair, so at unchanged weights
it is exactly 0. This is the contract; chain.py has the exact density of denoising steps, cfm.py FPO's surrogate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rlflow.flow.gaussian import Gaussian, Reduce
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import Plan, Steps
from rlflow.types import Chain, Cond, Evidence


@dataclass(frozen=True)
class Score:
    """What one network pass over an Evidence gives: log_prob (N, R) and the distributions (N, R, *D)."""

    log_prob: Tensor
    dist: Gaussian


class Likelihood:
    """Base of all likelihoods: `reduce` is over event dims, `joint` makes one ratio per row of the R columns."""

    reduce: Reduce
    joint: bool
    scores_steps: ClassVar[bool]
    """True when a column is a denoising step with its own density, kernel and std."""
    shared_draws: bool = False
    """True when `record` is given the numbers of groups for those of rows, so that a group's draws are one."""

    def check(self, policy: FlowPolicy, steps: Steps) -> None:
        """ValueError, before anything is sampled, where this likelihood cannot score what `steps` samples."""
        raise NotImplementedError

    def num_columns(self, plan: Plan) -> int:
        """R."""
        raise NotImplementedError

    def record_rows(self, policy: FlowPolicy) -> int:
        """Network rows that `record` evaluates for each sample."""
        raise NotImplementedError

    def record(self, policy: FlowPolicy, cond: Cond, chain: Chain, key: Key, row_ids: Tensor) -> Evidence:
        """Evidence (N, R, ...) of a sampled chain; what it draws is a function of (key, row_ids (N,)) only."""
        raise NotImplementedError

    def score(self, policy: FlowPolicy, cond: Cond, evidence: Evidence) -> Score:
        """One network pass over the N * R stored pairs; `cond` has N rows."""
        raise NotImplementedError

    def log_ratio(self, log_prob: Tensor, evidence: Evidence) -> Tensor:
        """(N, R), or (N, 1) when joint; invalid columns count as ratio 1."""
        raise NotImplementedError

    def states(self, evidence: Evidence) -> Tensor:
        """(N, R, *D) x_t of each pair, what the network reads when it is scored."""
        raise NotImplementedError

    def gain(self, policy: FlowPolicy, evidence: Evidence) -> Tensor:
        """(N, R) |dmean / dv| of the distributions that `score` gives."""
        raise NotImplementedError

    def velocity(self, policy: FlowPolicy, evidence: Evidence, mean: Tensor) -> Tensor:
        """(N, R, *D) the velocities that means of such distributions come from."""
        raise NotImplementedError

    def executed(self, evidence: Evidence, num_steps: Tensor, num_actions: int | None = None) -> Evidence:
        """Leave out actions of a chunk that were not carried out, those from num_steps (N,) on, and the padding of an
        action: its numbers from num_actions on; no network call."""
        raise NotImplementedError

    @torch.no_grad()
    def with_reference(
        self, policy: FlowPolicy, cond_of: Callable[[Tensor], Cond], evidence: Evidence, micro_batch: int
    ) -> Evidence:
        """Fill ref_mean, ref_std: one look of the 'ref' weights at every scored pair, `micro_batch` of them in a pass.

        `cond_of(rows)` encodes rows (M,), under the reference weights.
        """
        n, r = evidence.t.shape
        pairs = torch.cartesian_prod(*(torch.arange(size, device=evidence.t.device) for size in (n, r)))
        parts = []
        with policy.using("ref"), policy.field.without_idle():
            for part in pairs.split(micro_batch):
                rows, columns = part.unbind(1)
                parts.append(self.score(policy, cond_of(rows), evidence.pairs(rows, columns)).dist)
        mean, std = (
            torch.cat([getattr(p, name)[:, 0] for p in parts]).unflatten(0, (n, r)) for name in ("mean", "std")
        )
        return replace(evidence, ref_mean=mean, ref_std=std)


def carried_out(evidence: Evidence, num_steps: Tensor) -> Tensor:
    """(N, 1, H) bool: actions of the chunk, x's axis 2, before num_steps (N,)."""
    return torch.arange(evidence.x.shape[2], device=num_steps.device) < num_steps[:, None, None]


def carried_numbers(evidence: Evidence, num_actions: int) -> Tensor:
    """(1, 1, 1, A) bool: numbers of an action, x's axis 3, before num_actions."""
    return torch.arange(evidence.x.shape[3], device=evidence.x.device)[None, None, None] < num_actions


def only(evidence: Evidence, done: Tensor, log_prob: Callable[[Tensor], Tensor]) -> Evidence:
    """The evidence with the actions `done` (N, 1 or R, H), or their numbers (N, 1 or R, H, A), alone.

    `log_prob(counts)` is of the stored distribution.
    """
    counts = done.expand(*evidence.t.shape, *done.shape[2:])[(..., *[None] * (evidence.x.ndim - done.ndim))]
    old = torch.where(counts.flatten(2).all(-1), evidence.old_log_prob, log_prob(counts))
    return replace(evidence, old_log_prob=old, counts=counts)
