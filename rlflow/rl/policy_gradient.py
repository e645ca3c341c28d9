"""PolicyGradient: Flow-GRPO, MixGRPO, DanceGRPO, CPS, ReinFlow, pi_RL, FPO, NFT and PPO are this class, told apart
by its arguments.

    L = E[ max(-A r, -A clip(r, 1 - low, 1 + high)) ] + beta KL(policy || reference) - entropy H
        + anchor E[ |action - reference's action|^2 ],                                    critic: (V - R)^2

over (row, column) pairs, r = exp(score - old); SPO and ASPO (losses.py) hold r back in another way, and DiffusionNFT
(nft.py) has another loss of the same evidence. Every
expectation is a weighted mean whose denominator is summed over micro-batches and ranks first, so neither changes
the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlflow.flow.noise import Key, generator
from rlflow.flow.policy import FlowPolicy
from rlflow.rl import losses
from rlflow.rl.advantages import GAE, GroupAdvantage, moments
from rlflow.rl.anchor import Anchor
from rlflow.rl.batch import Batch, Meter, Pairs
from rlflow.rl.critic import CriticLearner, explained_variance
from rlflow.rl.groups import Groups
from rlflow.rl.likelihoods.base import Likelihood, Score
from rlflow.rl.losses import PerStep, weighted_sum
from rlflow.rl.nft import NFT
from rlflow.rl.optim import AdamW, Optimizer
from rlflow.types import Evidence, Rollout


@dataclass(frozen=True)
class KL:
    """beta x KL to the reference weights; 'released' and 'velocity' are other scales, see losses.reference_kl."""

    beta: float = 0.0
    kind: losses.KLKind = "exact"


def _check_groups(groups: Groups, advantage: GroupAdvantage | GAE) -> None:
    """ValueError where groups cannot be compared."""
    if isinstance(advantage, GroupAdvantage) and groups.group_size < 2:
        raise ValueError("a group of 1 has no group advantage: set group_size >= 2, or use advantage=gae (a critic)")


def _check_steps(likelihood: Likelihood, per_step: PerStep) -> None:
    if per_step.active and not likelihood.scores_steps:
        raise ValueError(
            f"{type(likelihood).__name__} has no denoising steps to discount or clip: leave out denoising_gamma "
            "and clip_base"
        )
    if likelihood.joint and per_step.active:
        raise ValueError(
            "a joint ratio has no single steps to discount or clip: use likelihood.joint=false with "
            "denoising_gamma and clip_base"
        )


def _learns_std(policy: FlowPolicy, likelihood: Likelihood) -> bool:
    return likelihood.scores_steps and any(p.requires_grad for p in policy.kernel.parameters())


def _check_terms(policy: FlowPolicy, likelihood: Likelihood, kl: KL, guard: bool, entropy: float) -> None:
    """ValueError for terms of the loss whose formula does not hold, or that have no gradient."""
    if not likelihood.scores_steps:
        _check_without_steps(type(likelihood).__name__, kl, guard, entropy)
        return
    learns_std = _learns_std(policy, likelihood)
    name = type(policy.kernel).__name__
    if guard and likelihood.joint:
        raise ValueError("GRPO-Guard re-scales each denoising step's ratio: use likelihood.joint=false with it")
    if guard and learns_std:
        raise ValueError(
            f"GRPO-Guard centres log-ratios of a fixed std, which {name} learns: use guard=false or kernel=flow_sde"
        )
    if kl.beta and kl.kind == "released" and learns_std:
        raise ValueError(
            f"the released KL is |dmu|^2 / (2 g^2) for one fixed g, but {name} learns its std: use kl.kind=exact"
        )
    if entropy and not learns_std:
        raise ValueError(
            f"{name} has a fixed std, so its entropy has no gradient: use entropy=0 or kernel=learned_noise"
        )


def _check_without_steps(name: str, kl: KL, guard: bool, entropy: float) -> None:
    """ValueError for terms that are of denoising steps and their std."""
    if guard:
        raise ValueError(f"GRPO-Guard re-scales each denoising step's ratio, and {name} has none: use guard=false")
    if kl.beta and kl.kind == "released":
        raise ValueError(f"the released KL is of denoising steps, and {name} has none: use kl.kind=exact")
    if entropy:
        raise ValueError(f"{name} knows no density, so there is no entropy to reward: use entropy=0")


class PolicyGradient:
    """Clipped policy gradient over any likelihood; `update(rollout)` is one iteration."""

    def __init__(
        self,
        policy: FlowPolicy,
        likelihood: Likelihood,
        advantage: GroupAdvantage | GAE,
        groups: Groups,
        *,
        optimizer: AdamW | None = None,
        clip_low: float = 2e-3,
        clip_high: float | None = None,
        surrogate: losses.Surrogate = losses.clipped_surrogate,
        epochs: int = 1,
        num_minibatches: int = 1,
        micro_batch: int = 256,
        kl: KL | None = None,
        guard: bool = False,
        entropy: float = 0.0,
        target_kl: float | None = None,
        anchor: float = 0.0,
        per_step: PerStep | None = None,
        nft: NFT | None = None,
        critic_steps: int = 1,
        critic_lr: float = 1e-3,
        critic_width: int = 128,
        critic_warmup: int = 0,
        ema_decay: float = 0.9,
        seed: int = 0,
    ):
        if clip_low <= 0 or (clip_high is not None and clip_high <= 0):
            raise ValueError("clip_low and clip_high must be positive")
        _check_groups(groups, advantage)
        _check_steps(likelihood, per_step or PerStep())
        if critic_warmup and not advantage.needs_critic:
            raise ValueError(f"{type(advantage).__name__} has no critic to warm up: use critic_warmup=0")
        _check_terms(policy, likelihood, kl or KL(), guard, entropy)
        if nft is not None:
            nft.check(likelihood)
        self.policy, self.likelihood, self.advantage, self.groups = policy, likelihood, advantage, groups
        self.clip_low, self.clip_high = clip_low, clip_low if clip_high is None else clip_high
        self.surrogate = surrogate
        self.epochs, self.num_minibatches, self.micro_batch = epochs, num_minibatches, micro_batch
        self.kl, self.guard, self.entropy, self.target_kl = kl or KL(), guard, entropy, target_kl
        self.anchor, self.per_step, self.nft = anchor, per_step or PerStep(), nft
        self.critic_warmup, self.ema_decay, self.seed = critic_warmup, ema_decay, seed
        self.optimizer = Optimizer([p for p in policy.parameters() if p.requires_grad], optimizer or AdamW())
        self.critic: CriticLearner | None = None
        if advantage.needs_critic:
            self.critic = CriticLearner(policy, lr=critic_lr, steps=critic_steps, width=critic_width)
        for name in ["ema"] + (["ref"] if self.kl.beta or anchor else []) + (["old"] if nft else []):
            policy.weights.snapshot(name)
        self.iteration = 0

    # -- one iteration ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Nothing to do before the first iteration."""

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Improve the policy on one rollout; returns metrics."""
        batch = self._prepare(rollout)
        log, stop = Meter(), False
        for epoch in range(self.epochs):
            for index, rows in enumerate(self._minibatches(rollout, epoch)):
                self._minibatch(batch, rows.to(self.policy.device), log, first=epoch == 0 and index == 0)
            if stop := self._diverged(log):
                break
        self.policy.field.unguided.observe(rollout.flat(rollout.obs))
        if self.nft is not None:
            self.policy.weights.blend("old", self.nft.old_decay(self.iteration))
        self.iteration += 1
        return log.metrics() | batch.metrics | {"policy/early_stop": float(stop)} | self._counters()

    @torch.no_grad()
    def _prepare(self, rollout: Rollout) -> Batch:
        """Advantages, and what the reference says where a term needs it: once per iteration."""
        batch = Batch(self.policy, rollout)
        values: Tensor | None = None
        next_values: Tensor | None = None
        if self.critic is not None:
            values, next_values = self.critic.values(rollout, batch.cond, self.micro_batch)
        batch.set_advantages(self.advantage(rollout, values, next_values))
        if values is not None:
            explained = explained_variance(values.flatten(), batch.returns, batch.row_alive)
            batch.metrics["critic/explained_variance"] = explained
        if _learns_std(self.policy, self.likelihood):
            std = batch.evidence.old_std.flatten(1).mean(1)
            batch.metrics["policy/std_mean"] = float(moments(std, batch.row_alive)[0])
        if rollout.num_steps is not None:
            batch.evidence = self.likelihood.executed(batch.evidence, rollout.num_steps.flatten())
        if self.kl.beta:
            batch.evidence = self.likelihood.with_reference(self.policy, batch.cond, batch.evidence, self.micro_batch)
        if self.anchor:
            key, rows = Key(self.seed, "anchor", self.iteration), rollout.row_ids.flatten()
            batch.anchor = Anchor.at(self.policy, batch.cond, rows, key, self.micro_batch)
        return batch

    def _counters(self) -> dict[str, float]:
        return {
            "optim/lr": self.optimizer.learning_rate(),
            "optim/steps": float(self.optimizer.steps),
            "optim/skipped_steps": float(self.optimizer.skipped),
        }

    def _minibatches(self, rollout: Rollout, epoch: int) -> list[Tensor]:
        horizon = rollout.reward.shape[0]
        g = generator("minibatch", self.seed, self.iteration, epoch)
        uniform = torch.rand(self.groups.num_groups * horizon, generator=g)
        return self.groups.minibatches(horizon, self.num_minibatches, uniform)

    def _diverged(self, log: Meter) -> bool:
        """KL stop after an epoch; the decision is the same on every rank because its inputs are global sums."""
        if self.target_kl is None or self._warming_up:
            return False
        return log.mean("policy/approx_kl", self.num_minibatches) > self.target_kl

    @property
    def _warming_up(self) -> bool:
        return self.iteration < self.critic_warmup

    def _minibatch(self, batch: Batch, rows: Tensor, log: Meter, first: bool) -> None:
        """One optimiser step of the policy (unless the critic warms up), and those of the critic, on `rows` (M,)."""
        log.begin(batch.denominator(rows), first)
        norm = math.nan if self._warming_up else self._policy_step(batch, rows, log)
        if self.critic is not None:
            with torch.no_grad():  # the critic trains only itself
                cond = batch.cond(rows)
            log.add("critic/loss", self.critic.fit(cond, batch.returns[rows], batch.row_alive[rows]))
        log.end(norm)

    def _policy_step(self, batch: Batch, rows: Tensor, log: Meter) -> float:
        self.optimizer.zero_grad()
        for part, coefficients in self._micro_batches(batch, rows, log):
            self._backward(batch, part, coefficients, log)
        if batch.anchor is not None:
            for part in rows.split(max(1, self.micro_batch // self.policy.num_steps)):
                self._anchor_backward(batch, batch.anchor, part, log)
        norm = self.optimizer.step()
        blend = min(self.ema_decay, (1 + self.optimizer.steps) / (10 + self.optimizer.steps))
        self.policy.weights.blend("ema", blend)
        return norm

    def _micro_batches(self, batch: Batch, rows: Tensor, log: Meter) -> Iterator[tuple[Pairs, Tensor | None]]:
        """Pieces of (row, column) pairs of one network pass each.

        Whole rows where R fits. A joint ratio that does not fit is scored first without gradient;
        c = dL / dlogp then stands in for it, which gives the one-graph gradient exactly.
        """
        r = batch.num_columns
        if r <= self.micro_batch:
            for part in rows.split(max(1, self.micro_batch // r)):
                yield Pairs(part, None), None
            return
        grid = torch.cartesian_prod(rows, torch.arange(r, device=rows.device))
        pairs = [Pairs(p[:, 0], p[:, 1]) for p in grid.split(self.micro_batch)]
        if not self.likelihood.joint:
            yield from ((p, None) for p in pairs)
            return
        with torch.no_grad():
            log_prob = torch.cat([self._score(batch, p)[0].log_prob for p in pairs]).reshape(-1, r)
        leaf, everything = log_prob.requires_grad_(), Pairs(rows, None)
        evidence = batch.evidence_of(everything)
        loss = self._policy_loss(self.likelihood.log_ratio(leaf, evidence), evidence, batch, everything, log)
        (c,) = torch.autograd.grad(loss, leaf)
        yield from zip(pairs, c.reshape(-1, 1).split(self.micro_batch), strict=True)

    def _score(self, batch: Batch, pairs: Pairs) -> tuple[Score, Evidence]:
        evidence = batch.evidence_of(pairs)
        return self.likelihood.score(self.policy, batch.cond(pairs.rows), evidence), evidence

    def _backward(self, batch: Batch, pairs: Pairs, coefficients: Tensor | None, log: Meter) -> None:
        score, evidence = self._score(batch, pairs)
        if self.nft is not None:
            loss = self._mean(self.nft.loss(score.dist.mean, evidence, batch.advantage[pairs.rows]), batch, pairs, log)
        elif coefficients is None:
            log_ratio = self.likelihood.log_ratio(score.log_prob, evidence)
            if self.guard:
                log_ratio = losses.guard_log_ratio(log_ratio, score, evidence, self.likelihood.reduce)
            loss = self._policy_loss(log_ratio, evidence, batch, pairs, log)
        else:
            loss = (coefficients * score.log_prob).sum()
        loss = loss + self._regularizer(score, evidence, batch, pairs, log)
        loss.backward()
        diff = torch.where(evidence.valid, score.log_prob.detach() - evidence.old_log_prob, 0.0)
        weight = batch.pair_weight(pairs, joint=False)
        log.add("policy/approx_kl", weighted_sum(torch.expm1(diff) - diff, weight) / log.denominator(False))
        if self.nft is None or self.iteration == 0:  # later its samples are of other weights, and there is no ratio
            log.first_ratio(diff)

    def _mean(self, loss: Tensor, batch: Batch, pairs: Pairs, log: Meter) -> Tensor:
        """Of single pairs (M, R) over the global denominator; logged."""
        mean = weighted_sum(loss, batch.pair_weight(pairs, joint=False)) / log.denominator(False)
        log.add("policy/loss", mean)
        return mean

    def _policy_loss(self, log_ratio: Tensor, evidence: Evidence, batch: Batch, pairs: Pairs, log: Meter) -> Tensor:
        """Clipped surrogate of the ratios (M, R), or (M, 1) when joint, over its global denominator; logged."""
        joint, advantage = self.likelihood.joint, batch.advantage[pairs.rows]
        weight, total = batch.pair_weight(pairs, joint), log.denominator(joint)
        advantage, low, high = self._of_steps(advantage, evidence)
        surrogate = self.surrogate(log_ratio, advantage, low, high)
        if self.guard:
            surrogate = surrogate / (evidence.t_next - evidence.t)
        loss = weighted_sum(surrogate, weight) / total
        clipped = losses.clip_fraction(log_ratio.detach(), advantage, low, high)
        log.add("policy/loss", loss)
        log.add("policy/ratio_mean", weighted_sum(log_ratio.detach().exp(), weight) / total)
        log.add("policy/clip_frac", weighted_sum(clipped, weight) / total)
        return loss

    def _of_steps(self, advantage: Tensor, evidence: Evidence) -> tuple[Tensor, losses.Clip, losses.Clip]:
        """Advantage (M, 1) or (M, R), and the clip range, of the denoising steps that the columns stand for."""
        if not self.per_step.active:
            return advantage, self.clip_low, self.clip_high
        num = self.policy.num_steps
        k = losses.step_index(evidence.t, self.policy.grid(num)).to(advantage)
        low, high = (self.per_step.clip(k, num, top) for top in (self.clip_low, self.clip_high))
        return advantage * self.per_step.discount(k, num), low, high

    def _anchor_backward(self, batch: Batch, anchor: Anchor, rows: Tensor, log: Meter) -> None:
        weight, total = batch.row_alive[rows], log.rows
        distance = weighted_sum(anchor.distance(batch.cond(rows), rows), weight) / total
        log.add("policy/anchor", distance)
        (self.anchor * distance).backward()

    def _regularizer(self, score: Score, evidence: Evidence, batch: Batch, pairs: Pairs, log: Meter) -> Tensor:
        """beta KL to the reference less the entropy bonus, over their global denominators; logged apart."""
        loss, reduce = score.log_prob.new_zeros(()), self.likelihood.reduce
        if self.kl.beta:
            gain = self.likelihood.gain(self.policy, evidence) if self.kl.kind == "velocity" else None
            kl = losses.reference_kl(self.kl.kind, score.dist, evidence, reduce, gain)
            kl_mean = weighted_sum(kl, batch.alive(pairs)) / log.alive
            log.add("kl/ref", kl_mean)
            loss = loss + self.kl.beta * kl_mean
        if self.entropy:
            weight = batch.pair_weight(pairs, joint=False)
            entropy = weighted_sum(score.dist.entropy(reduce, batch_dims=2), weight) / log.denominator(False)
            log.add("policy/entropy", entropy)
            loss = loss - self.entropy * entropy
        return loss

    # -- state ------------------------------------------------------------------------------------

    def set_progress(self, progress: float) -> None:
        """Share of the run that is done, for schedules: before a rollout, so that its update sees the same kernel."""
        self.optimizer.progress = progress
        self.policy.kernel.set_progress(progress)

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs besides the policy and its weight sets."""
        state: dict[str, Any] = {"iteration": self.iteration, "optimizer": self.optimizer.state_dict()}
        if self.critic is not None:
            state["critic"] = self.critic.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.iteration = int(state["iteration"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
