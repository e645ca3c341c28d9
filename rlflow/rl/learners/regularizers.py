"""Regularisers of a policy gradient beside its objective: KL to the reference, norm of the velocity, and entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlflow.flow.gaussian import Gaussian, Reduce, reduce_events
from rlflow.flow.policy import FlowPolicy
from rlflow.rl.batch import Meter, Pairs, Rows
from rlflow.rl.likelihoods.base import Likelihood, Score
from rlflow.rl.masked import weighted_sum
from rlflow.types import Evidence

KLKind = Literal["exact", "velocity", "released"]


@dataclass(frozen=True)
class KL:
    """beta x KL to the reference weights, of each pair; the kinds are those of `reference_kl`."""

    beta: float = 0.0
    kind: KLKind = "exact"

    def check(self, policy: FlowPolicy, likelihood: Likelihood) -> None:
        """ValueError where the released scale, of a fixed std of a step, has no meaning."""
        if not self.beta or self.kind != "released":
            return
        if not likelihood.scores_steps:
            name = type(likelihood).__name__
            raise ValueError(f"the released KL is of denoising steps, and {name} has none: use kl.kind=exact")
        if policy.kernel.learns_std:
            raise ValueError(
                f"the released KL is |dmu|^2 / (2 g^2) for one fixed g, but {type(policy.kernel).__name__} learns its "
                "std: use kl.kind=exact"
            )

    def pairs(self, policy: FlowPolicy, likelihood: Likelihood, score: Score, evidence: Evidence) -> Tensor:
        """(M, R) of scored pairs whose reference was recorded, without beta."""
        gain = likelihood.gain(policy, evidence) if self.kind == "velocity" else None
        return reference_kl(self.kind, score.dist, evidence, likelihood.reduce, gain)


class Regularizers:
    """beta KL + norm_guard E[ max(0, |v| - |v_ref|) ] - entropy H, of what a policy gradient scores.

    ValueError at construction for a term that has no meaning, or no gradient, for such a policy or likelihood.
    """

    def __init__(self, policy: FlowPolicy, likelihood: Likelihood, kl: KL, norm_guard: float, entropy: float):
        kl.check(policy, likelihood)
        if entropy:
            check_entropy(policy, likelihood)
        self.policy, self.likelihood = policy, likelihood
        self.kl, self.norm_guard, self.entropy = kl, norm_guard, entropy
        self.needs_reference = bool(kl.beta or norm_guard)

    def loss(self, score: Score, evidence: Evidence, batch: Rows, pairs: Pairs, log: Meter) -> Tensor:
        """This rank's share of each term over its global denominator; logged apart."""
        loss, alive = score.log_prob.new_zeros(()), batch.alive(pairs)
        if self.kl.beta:
            kl = weighted_sum(self.kl.pairs(self.policy, self.likelihood, score, evidence), alive) / log.alive
            log.add("kl/ref", kl)
            loss = loss + self.kl.beta * kl
        if self.norm_guard:
            excess = weighted_sum(norm_excess(self.policy, self.likelihood, score, evidence), alive) / log.alive
            log.add("policy/norm_excess", excess)
            loss = loss + self.norm_guard * excess
        if self.entropy:
            of_pairs = score.dist.entropy(self.likelihood.reduce, batch_dims=2)
            entropy = weighted_sum(of_pairs, batch.pair_weight(pairs, joint=False)) / log.denominator(False)
            log.add("policy/entropy", entropy)
            loss = loss - self.entropy * entropy
        return loss


def velocity_norm(policy: FlowPolicy, likelihood: Likelihood, evidence: Evidence, mean: Tensor) -> Tensor:
    """|v| (M, R), the root mean square over the event, of the velocities behind means (M, R, *D)."""
    flat = likelihood.velocity(policy, evidence, mean).flatten(2)
    return torch.linalg.vector_norm(flat, dim=-1) / flat.shape[-1] ** 0.5  # unlike a root, no nan at v = 0


def norm_excess(policy: FlowPolicy, likelihood: Likelihood, score: Score, evidence: Evidence) -> Tensor:
    """(M, R) max(0, |v| - |v_ref|) of scored pairs whose reference was recorded (NormGuard, Pan et al. 2026).

    RL inflates the velocity's norm, which shows as glare and texture; the hinge holds it back and nothing else: a pair
    whose norm is below the reference's has no gradient. Of the paper its abstract was read: linear in the root mean
    square is ours.
    """
    assert evidence.ref_mean is not None
    mine, reference = (velocity_norm(policy, likelihood, evidence, m) for m in (score.dist.mean, evidence.ref_mean))
    return (mine - reference).relu()


def check_entropy(policy: FlowPolicy, likelihood: Likelihood) -> None:
    """ValueError where an entropy bonus has no gradient, or there is no density."""
    if not likelihood.scores_steps:
        name = type(likelihood).__name__
        raise ValueError(f"{name} knows no density, so there is no entropy to reward: use entropy=0")
    if not policy.kernel.learns_std:
        raise ValueError(
            f"{type(policy.kernel).__name__} has a fixed std, so its entropy has no gradient: use entropy=0 or "
            "kernel=learned_noise"
        )


def reference_kl(kind: KLKind, dist: Gaussian, evidence: Evidence, reduce: Reduce, gain: Tensor | None) -> Tensor:
    """KL to the reference per pair (N, R).

    'exact': the Gaussian KL of the step in nats. 'velocity': |v - v_ref|^2 = |dmu|^2 / gain^2.
    'released': Flow-GRPO's |dmu|^2 / (2 g^2) with g^2 = S^2 / dt, i.e. dt times the exact KL.
    """
    if evidence.ref_mean is None or evidence.ref_std is None:
        raise ValueError("no reference was recorded: ask the learner for a kl term before the rollout is scored")
    if kind == "velocity":
        assert gain is not None
        return reduce_events((dist.mean - evidence.ref_mean).square(), reduce, batch_dims=2) / gain.square()
    exact = dist.kl(Gaussian(evidence.ref_mean, evidence.ref_std), reduce, batch_dims=2)
    return exact if kind == "exact" else exact * (evidence.t_next - evidence.t)
