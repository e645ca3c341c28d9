"""Likelihoods: evidence recorded while sampling, scored again at update time, R columns per row.

A log-ratio is `score - old`. Both come from the same Gaussian log-density on the same stored pair, so
at unchanged weights it is exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlflow.flow.gaussian import Gaussian, Reduce
from rlflow.flow.policy import FlowPolicy
from rlflow.types import Chain, Cond, Evidence


@dataclass(frozen=True)
class Score:
    """What one network pass over an Evidence gives: log_prob (N, R) and the distributions (N, R, *D)."""

    log_prob: Tensor
    dist: Gaussian


@dataclass(frozen=True)
class ChainLikelihood:
    """Exact Gaussian log-density of the scored denoising steps.

    `reduce` is over event dims. `joint` sums the columns into one ratio per row (ReinFlow, Flow-Noise);
    otherwise each step has its own.
    """

    reduce: Reduce = "mean"
    joint: bool = False

    def record(self, policy: FlowPolicy, cond: Cond, chain: Chain) -> Evidence:
        """Evidence (N, R, ...) of a sampled chain; no network call."""
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
        return Score(self._log_prob(dist, evidence.x_next), dist)

    def _log_prob(self, dist: Gaussian, x: Tensor) -> Tensor:
        return dist.log_prob(x, self.reduce, batch_dims=2)

    def log_ratio(self, log_prob: Tensor, evidence: Evidence) -> Tensor:
        """(N, R), or (N, 1) when joint; invalid columns count as ratio 1."""
        diff = torch.where(evidence.valid, log_prob - evidence.old_log_prob, 0.0)
        return diff.sum(1, keepdim=True) if self.joint else diff

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
