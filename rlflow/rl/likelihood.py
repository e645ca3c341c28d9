"""Likelihoods: evidence recorded while sampling, scored again at update time, R columns per row.

A log-ratio is `score - old`. Both come from the same function of the same stored pair, so at unchanged weights
it is exactly 0. Here are the contract and the exact density of denoising steps; `cfm.py` has FPO's surrogate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

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

    def gain(self, policy: FlowPolicy, evidence: Evidence) -> Tensor:
        """(N, R) |dmean / dv| of the distributions that `score` gives."""
        raise NotImplementedError

    def executed(self, evidence: Evidence, num_steps: Tensor) -> Evidence:
        """Leave out actions of a chunk that were not carried out: those from num_steps (N,) on; no network call."""
        raise NotImplementedError

    @torch.no_grad()
    def with_reference(
        self, policy: FlowPolicy, cond_of: Callable[[Tensor], Cond], evidence: Evidence, micro_batch: int
    ) -> Evidence:
        """Fill ref_mean, ref_std: one pass of the 'ref' weights over the scored pairs.

        `cond_of(rows)` encodes rows (M,), under the reference weights.
        """
        n, r = evidence.t.shape
        parts = []
        with policy.using("ref"):
            for rows in torch.arange(n, device=evidence.t.device).split(max(1, micro_batch // r)):
                parts.append(self.score(policy, cond_of(rows), evidence.index(rows)).dist)
        mean, std = torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])
        return replace(evidence, ref_mean=mean, ref_std=std)


def carried_out(evidence: Evidence, num_steps: Tensor) -> Tensor:
    """(N, 1, H) bool: actions of the chunk, x's axis 2, before num_steps (N,)."""
    return torch.arange(evidence.x.shape[2], device=num_steps.device) < num_steps[:, None, None]


def only(evidence: Evidence, done: Tensor, log_prob: Callable[[Tensor], Tensor]) -> Evidence:
    """The evidence with the actions `done` (N, 1 or R, H) alone; `log_prob(counts)` is of the stored distribution."""
    counts = done.expand(*evidence.t.shape, done.shape[-1])[(..., *[None] * (evidence.x.ndim - 3))]
    old = torch.where(counts.flatten(2).all(-1), evidence.old_log_prob, log_prob(counts))
    return replace(evidence, old_log_prob=old, counts=counts)


@dataclass(frozen=True)
class ChainLikelihood(Likelihood):
    """Exact Gaussian log-density of the scored denoising steps.

    `reduce` is over event dims. `joint` sums the columns into one ratio per row (ReinFlow, Flow-Noise);
    otherwise each step has its own. `published` is the released ReinFlow's geometric mean: the joint log-ratio
    over R + 1 (x_0's density, which cancels, is counted) and over the event's size, so its clip of .01 stands
    for .01 (R + 1) H D nats. `mask` says where actions of a chunk that an episode's end left undone do not
    count: at the last denoising step (exact), or at all of them (the published approximation).
    """

    reduce: Reduce = "mean"
    joint: bool = False
    published: bool = False
    mask: Literal["last", "all"] = "last"
    scores_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.published and not (self.joint and self.reduce == "mean"):
            raise ValueError("the published ratio is a joint mean: set joint=true and reduce=mean with it")

    def check(self, policy: FlowPolicy, steps: Steps) -> None:
        """ValueError for a plan without scored steps."""
        if not steps.possible(policy.num_steps):
            raise ValueError(
                f"{type(steps).__name__} scores no step: use steps=all_but_last or another plan with it, or "
                "likelihood=cfm without"
            )

    def num_columns(self, plan: Plan) -> int:
        """The scored steps."""
        return plan.num_scored

    def record_rows(self, policy: FlowPolicy) -> int:
        """None: the chain was scored while it was sampled."""
        return 0

    def record(self, policy: FlowPolicy, cond: Cond, chain: Chain, key: Key, row_ids: Tensor) -> Evidence:
        """Evidence (N, R, ...) of a sampled chain; no network call, no draw."""
        if chain.t.shape[1] == 0:
            raise ValueError(
                "the chain likelihood needs scored steps: this plan has none (steps=all_but_last, window, ...)"
            )
        old = Gaussian(chain.mean, chain.std)
        log_prob = self._log_prob(old, chain.x_next)
        valid = torch.ones_like(chain.t, dtype=torch.bool)
        return Evidence(chain.x, chain.x_next, chain.t, chain.t_next, log_prob, chain.mean, chain.std, valid)

    def score(self, policy: FlowPolicy, cond: Cond, evidence: Evidence) -> Score:
        """One network pass over the N * R stored pairs; `cond` has N rows."""
        n, r = evidence.t.shape
        rows = torch.arange(n, device=evidence.t.device).repeat_interleave(r)
        x, t, t_next = (v.flatten(0, 1) for v in (evidence.x, evidence.t, evidence.t_next))
        dist = policy.transition(x, t, t_next, cond.index(rows))
        dist = Gaussian(dist.mean.unflatten(0, (n, r)), dist.std.unflatten(0, (n, r)))
        return Score(self._log_prob(dist, evidence.x_next, evidence.counts), dist)

    def _log_prob(self, dist: Gaussian, x: Tensor, counts: Tensor | None = None) -> Tensor:
        return dist.log_prob(x, self.reduce, batch_dims=2, mask=counts)

    def log_ratio(self, log_prob: Tensor, evidence: Evidence) -> Tensor:
        """(N, R), or (N, 1) when joint; invalid columns count as ratio 1."""
        diff = torch.where(evidence.valid, log_prob - evidence.old_log_prob, 0.0)
        if not self.joint:
            return diff
        return diff.sum(1, keepdim=True) / (diff.shape[1] + 1 if self.published else 1)

    def gain(self, policy: FlowPolicy, evidence: Evidence) -> Tensor:
        """The kernel's."""
        t, t_next = evidence.t.flatten(), evidence.t_next.flatten()
        return policy.kernel.gain(t, t_next).view_as(evidence.t)

    def executed(self, evidence: Evidence, num_steps: Tensor) -> Evidence:
        """Leave out actions that were not carried out: those from num_steps (N,) on along the chunk, x's axis 2.

        Of the step into t = 1 only: there they have no effect, whereas at earlier ones they still move the
        mean of the executed actions. A density that loses entries is of the stored distribution; no network call.
        """
        done = carried_out(evidence, num_steps)
        if self.mask == "last":
            done = done | (evidence.t_next < 1).unsqueeze(-1)
        old = Gaussian(evidence.old_mean, evidence.old_std)
        return only(evidence, done, lambda counts: self._log_prob(old, evidence.x_next, counts))
