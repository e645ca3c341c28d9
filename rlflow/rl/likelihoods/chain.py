"""The exact Gaussian likelihood of the denoising steps that were scored (Flow-GRPO, ReinFlow, pi_RL and others)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlflow.flow.gaussian import Gaussian, Reduce
from rlflow.flow.guidance import CONSTANT
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import Plan, Steps
from rlflow.rl.likelihoods.base import Likelihood, Score, carried_numbers, carried_out, only
from rlflow.types import Chain, Cond, Evidence


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
        cond = cond.index(rows)
        if evidence.constant is not None:
            cond = Cond({n: cond[n] for n in cond.data} | {CONSTANT: evidence.constant.flatten(0, 1)})
        dist = policy.transition(x, t, t_next, cond)
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

    def states(self, evidence: Evidence) -> Tensor:
        """Where each step begins."""
        return evidence.x

    def gain(self, policy: FlowPolicy, evidence: Evidence) -> Tensor:
        """The kernel's."""
        t, t_next = evidence.t.flatten(), evidence.t_next.flatten()
        return policy.kernel.gain(t, t_next).view_as(evidence.t)

    def velocity(self, policy: FlowPolicy, evidence: Evidence, mean: Tensor) -> Tensor:
        """By the kernel, whose mean is affine in it; no network call."""
        flat = (v.flatten(0, 1) for v in (mean, evidence.x, evidence.t, evidence.t_next))
        return policy.kernel.velocity_of(*flat).view_as(mean)

    def executed(self, evidence: Evidence, num_steps: Tensor, num_actions: int | None = None) -> Evidence:
        """Leave out actions that were not carried out: those from num_steps (N,) on along the chunk, x's axis 2, and
        padding: numbers from num_actions on, x's last axis.

        Of the step into t = 1 only: there they have no effect, whereas at earlier ones they still move the
        mean of the executed actions. A density that loses entries is of the stored distribution; no network call.
        """
        done = carried_out(evidence, num_steps)
        if num_actions is not None:
            done = done.unsqueeze(-1) & carried_numbers(evidence, num_actions)
        if self.mask == "last":
            done = done | (evidence.t_next < 1)[(..., *[None] * (done.ndim - 2))]
        old = Gaussian(evidence.old_mean, evidence.old_std)
        return only(evidence, done, lambda counts: self._log_prob(old, evidence.x_next, counts))
