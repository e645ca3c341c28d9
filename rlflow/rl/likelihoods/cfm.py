"""FPO's surrogate likelihood: minus the flow-matching loss at S stored draws (McAllister et al. 2025; FPO++ 2026).

    score_s = -w(t)^2 |v(x_t, t) - (x_1 - x_0)|^2,   x_t = (1 - t) x_0 + t x_1,   x_0 ~ N(0, I),  t ~ U(0, 1)

for the sample x_1 and S draws (x_0, t) that are made once, during the rollout, and stored. No density and no noisy step
is needed: samples come from the ODE. At unchanged weights the ratio is 1 and the gradient of the objective is -A grad
loss; further away the log-ratio is some multiple of the exact one, which depends on the policy's width (`calibration`).

V-GRPO (Tang et al. 2026) compares samples of a group at the same draws, stratifies their times, and weighs each loss
by one over the size of its error, so that no time and no draw outshouts the reward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlflow.flow.gaussian import Gaussian, Reduce, reduce_events
from rlflow.flow.matching import on_path
from rlflow.flow.noise import Key, noise
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import Plan, Steps
from rlflow.ranges import Size
from rlflow.rl.likelihoods.base import Likelihood, Score, carried_numbers, carried_out, only
from rlflow.types import Chain, Cond, Evidence

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "velocity": torch.ones_like,
    "eps": lambda t: t,
    "sample": lambda t: 1 - t,
}
"""w(t) by what the loss supervises: v predicts the noise x_t - t v, of t times its error, and the sample
x_t + (1 - t) v, of 1 - t times its error."""

SMALLEST = 1e-5
"""Of the mean error that a normalised loss is divided by."""


@dataclass(frozen=True)
class CFMLikelihood(Likelihood):
    """Minus the matching loss of the sample at `draws` stored (noise, time) draws (FPO, FPO++).

    `supervise` eps weighs the velocity's squared error by t^2, sample by (1 - t)^2. `joint` means the draws before the
    exponential, one ratio per sample (FPO); otherwise each draw has its own ratio (FPO++). `on_grid` draws times among
    the starts of the policy's denoising steps, as released. V-GRPO: `stratified` draws one time in each S-th of [0, 1],
    `shared_draws` the same draws for all rows of a group, `normalize` divides a loss by the mean absolute error that
    the sampling weights have there. The loss reads the field without guidance; samples made with guidance are not its
    own, and refused unless `allow_guided`. Of a distilled network no samples are, and it loses what it was distilled
    to: refused unless `allow_distilled`.
    """

    draws: Size = 8
    supervise: Literal["velocity", "eps", "sample"] = "velocity"
    reduce: Reduce = "mean"
    joint: bool = True
    on_grid: bool = False
    stratified: bool = False
    shared_draws: bool = False
    normalize: bool = False
    allow_guided: bool = False
    allow_distilled: bool = False
    scores_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")

    def check(self, policy: FlowPolicy, steps: Steps) -> None:
        """ValueError for guidance, and for a field without an instantaneous velocity."""
        if policy.field is not policy.field.unguided and not self.allow_guided:
            raise ValueError(
                "a guided field is not the expectation of its own samples' velocity, so a matching loss pulls even "
                "where all advantages are equal: use guidance=null, or likelihood.allow_guided=true"
            )
        if policy.field.distilled is not None and not self.allow_distilled:
            raise ValueError(
                f"this network was distilled to {policy.field.distilled}, which a matching loss undoes: take the base "
                "model, likelihood=chain, or likelihood.allow_distilled=true"
            )
        if not policy.field.has_instantaneous:
            raise ValueError("a matching loss needs a dt = 0 branch, which this field lacks: use likelihood=chain")

    def num_columns(self, plan: Plan) -> int:
        """S, whatever the plan scores."""
        return self.draws

    def record_rows(self, policy: FlowPolicy) -> int:
        """S passes without guidance: the losses before the update."""
        return self.draws * policy.field.unguided.calls

    def record(self, policy: FlowPolicy, cond: Cond, chain: Chain, key: Key, row_ids: Tensor) -> Evidence:
        """x holds the noise draws, x_next the sample, t the times; one network pass over N * S rows."""
        x_0 = self._draw(policy, key, "noise", row_ids, (self.draws, *policy.event_shape))
        t = self._times(policy, self._draw(policy, key, "time", row_ids, (self.draws,)))
        x_1 = chain.final.unsqueeze(1).expand_as(x_0)
        v = self._velocity(policy, cond, x_0, x_1, t)
        valid = torch.ones_like(t, dtype=torch.bool)
        std = torch.full_like(t, 0.5**0.5)[(..., *[None] * (v.ndim - 2))]
        found = Evidence(x_0, x_1, t, torch.ones_like(t), torch.zeros_like(t), v, std, valid)
        return replace(found, old_log_prob=self._minus_loss(v, found))

    @staticmethod
    def _draw(policy: FlowPolicy, key: Key, what: str, row_ids: Tensor, shape: tuple[int, ...]) -> Tensor:
        key = key._replace(purpose=f"{key.purpose}/cfm/{what}")
        return noise(key, row_ids.cpu(), shape, policy.dtype, policy.device)

    def _times(self, policy: FlowPolicy, normal: Tensor) -> Tensor:
        """Standard normal (N, S) to times: uniform, in all or in the s-th part, or uniform among the grid's starts.

        All of what the network knows: from its first time on."""
        t = torch.special.ndtr(normal)
        if self.stratified:
            t = (t + torch.arange(self.draws, device=t.device)) / self.draws
        if not self.on_grid:
            return policy.field.first_time + (1 - policy.field.first_time) * t
        k = (t * policy.num_steps).long().clamp(max=policy.num_steps - 1)
        return policy.grid(policy.num_steps).to(t)[k]

    @staticmethod
    def _velocity(policy: FlowPolicy, cond: Cond, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        """(N, S, *D) at the draws."""
        n, s = t.shape
        rows = torch.arange(n, device=t.device).repeat_interleave(s)

        def unguided(x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
            return policy.velocity(x, t, dt, cond, guided=False)

        flat = on_path(unguided, x_1.flatten(0, 1), cond.index(rows), x_0.flatten(0, 1), t.flatten())
        return flat.unflatten(0, (n, s))

    def _minus_loss(self, v: Tensor, evidence: Evidence, counts: Tensor | None = None) -> Tensor:
        """(N, S) minus the loss of v; entries where `counts` is False are left out, a mean still divides by all."""
        u, weight = evidence.x_next - evidence.x, WEIGHTS[self.supervise](evidence.t)
        loss = weight.square() * self._over_event((v - u).square(), counts)
        if self.normalize:
            loss = loss / (weight * self._over_event((evidence.old_mean - u).abs(), counts)).clamp(min=SMALLEST)
        return -loss

    def _over_event(self, value: Tensor, counts: Tensor | None) -> Tensor:
        return reduce_events(value if counts is None else torch.where(counts, value, 0.0), self.reduce, batch_dims=2)

    def score(self, policy: FlowPolicy, cond: Cond, evidence: Evidence) -> Score:
        """Minus the losses, and the velocities as means of N(v, 1/2), whose KL is |v - v_ref|^2."""
        v = self._velocity(policy, cond, evidence.x, evidence.x_next, evidence.t)
        return Score(self._minus_loss(v, evidence, evidence.counts), Gaussian(v, evidence.old_std))

    def log_ratio(self, log_prob: Tensor, evidence: Evidence) -> Tensor:
        """(N, S), or the mean of the draws (N, 1) when joint."""
        diff = torch.where(evidence.valid, log_prob - evidence.old_log_prob, 0.0)
        return diff.mean(1, keepdim=True) if self.joint else diff

    def states(self, evidence: Evidence) -> Tensor:
        """On the straight path from each noise draw to the sample."""
        t = evidence.t[(..., *[None] * (evidence.x.ndim - 2))]
        return (1 - t) * evidence.x + t * evidence.x_next

    def gain(self, policy: FlowPolicy, evidence: Evidence) -> Tensor:
        """1: the distributions are over velocities."""
        return torch.ones_like(evidence.t)

    def velocity(self, policy: FlowPolicy, evidence: Evidence, mean: Tensor) -> Tensor:
        """The means themselves."""
        return mean

    def executed(self, evidence: Evidence, num_steps: Tensor, num_actions: int | None = None) -> Evidence:
        """The losses of the executed actions alone; the others still stand beside them in x_t."""

        def old(counts: Tensor) -> Tensor:
            return self._minus_loss(evidence.old_mean, evidence, counts)

        done = carried_out(evidence, num_steps)
        if num_actions is not None:
            done = done.unsqueeze(-1) & carried_numbers(evidence, num_actions)
        return only(evidence, done, old)


def calibration(log_ratio: Tensor, exact: Tensor) -> tuple[float, float]:
    """(slope of the surrogate's log-ratio against the exact one through 0, their correlation), both (N,)."""
    slope = (log_ratio * exact).sum() / exact.square().sum()
    return float(slope), float(torch.corrcoef(torch.stack([log_ratio, exact]))[0, 1])
