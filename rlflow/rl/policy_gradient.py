"""PolicyGradient: Flow-GRPO, MixGRPO, DanceGRPO, CPS, ReinFlow, pi_RL and PPO are this class with other arguments.

    L = E[ max(-A r, -A clip(r, 1 - low, 1 + high)) ] + beta KL(policy || reference) - entropy H,    critic: (V - R)^2

over (row, column) pairs, r = exp(score - old). Every expectation is a weighted mean whose denominator
is summed over micro-batches and ranks first, so neither changes the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlflow import dist
from rlflow.flow.noise import generator
from rlflow.flow.policy import FlowPolicy
from rlflow.rl import losses
from rlflow.rl.advantages import GAE, GroupAdvantage
from rlflow.rl.batch import Batch, Meter, Pairs
from rlflow.rl.critic import Critic
from rlflow.rl.groups import Groups
from rlflow.rl.likelihood import ChainLikelihood, Score
from rlflow.rl.losses import weighted_sum
from rlflow.rl.optim import AdamW, Optimizer
from rlflow.types import Evidence, Rollout


@dataclass(frozen=True)
class KL:
    """beta x KL to the reference weights; 'released' and 'velocity' are other scales, see losses.reference_kl."""

    beta: float = 0.0
    kind: losses.KLKind = "exact"


def _check_groups(groups: Groups, advantage: GroupAdvantage | GAE, num_minibatches: int) -> None:
    """ValueError where groups cannot be compared, or cannot be dealt to minibatches."""
    if isinstance(advantage, GroupAdvantage) and groups.group_size < 2:
        raise ValueError("a group of 1 has no group advantage: set group_size >= 2, or use advantage=gae (a critic)")
    if groups.local % num_minibatches:
        raise ValueError(
            f"num_minibatches={num_minibatches} must divide the {groups.local} groups of each process: "
            "a minibatch takes whole groups"
        )


def _check_terms(policy: FlowPolicy, likelihood: ChainLikelihood, kl: KL, guard: bool, entropy: float) -> None:
    """ValueError for terms of the loss whose formula does not hold, or that have no gradient."""
    learns_std = any(p.requires_grad for p in policy.kernel.parameters())
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


class PolicyGradient:
    """Clipped policy gradient over any likelihood; `update(rollout)` is one iteration."""

    def __init__(
        self,
        policy: FlowPolicy,
        likelihood: ChainLikelihood,
        advantage: GroupAdvantage | GAE,
        groups: Groups,
        *,
        optimizer: AdamW | None = None,
        clip_low: float = 2e-3,
        clip_high: float | None = None,
        epochs: int = 1,
        num_minibatches: int = 1,
        micro_batch: int = 256,
        kl: KL | None = None,
        guard: bool = False,
        entropy: float = 0.0,
        target_kl: float | None = None,
        critic_steps: int = 1,
        critic_lr: float = 1e-3,
        ema_decay: float = 0.9,
        seed: int = 0,
    ):
        if clip_low <= 0 or (clip_high is not None and clip_high <= 0):
            raise ValueError("clip_low and clip_high must be positive")
        _check_groups(groups, advantage, num_minibatches)
        _check_terms(policy, likelihood, kl or KL(), guard, entropy)
        self.policy, self.likelihood, self.advantage, self.groups = policy, likelihood, advantage, groups
        self.clip_low, self.clip_high = clip_low, clip_low if clip_high is None else clip_high
        self.epochs, self.num_minibatches, self.micro_batch = epochs, num_minibatches, micro_batch
        self.kl, self.guard, self.entropy, self.target_kl = kl or KL(), guard, entropy, target_kl
        self.critic_steps, self.ema_decay, self.seed = critic_steps, ema_decay, seed
        self.optimizer = Optimizer([p for p in policy.parameters() if p.requires_grad], optimizer or AdamW())
        self.critic, self.critic_optimizer = None, None
        if advantage.needs_critic:
            self.critic = Critic(policy.field.num_features).to(policy.device, policy.dtype)
            self.critic_optimizer = Optimizer(list(self.critic.parameters()), AdamW(lr=critic_lr))
        for name in ["ema"] + (["ref"] if self.kl.beta else []):
            policy.weights.snapshot(name)
        self.iteration = 0

    # -- one iteration ----------------------------------------------------------------------------

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Improve the policy on one rollout; returns metrics."""
        assert rollout.evidence is not None
        batch = self._prepare(rollout)
        log = Meter()
        stop = False
        for epoch in range(self.epochs):
            for index, rows in enumerate(self._minibatches(rollout, epoch)):
                self._minibatch(batch, rows.to(self.policy.device), log, first=epoch == 0 and index == 0)
                if stop := self._diverged(log):
                    break
            if stop:
                break
        self.iteration += 1
        return log.metrics() | batch.metrics() | {"policy/early_stop": float(stop)} | self._counters()

    @torch.no_grad()
    def _prepare(self, rollout: Rollout) -> Batch:
        """Advantages, and the reference means where a KL term needs them: once per iteration."""
        batch = Batch(self.policy, rollout)
        batch.set_advantages(self.advantage(rollout, *self.values(rollout, batch.cond)))
        if self.kl.beta:
            batch.evidence = self.likelihood.with_reference(self.policy, batch.cond, batch.evidence, self.micro_batch)
        return batch

    def _counters(self) -> dict[str, float]:
        return {
            "optim/lr": self.optimizer.learning_rate(),
            "optim/steps": float(self.optimizer.steps),
            "optim/skipped_steps": float(self.optimizer.skipped),
        }

    def _minibatches(self, rollout: Rollout, epoch: int) -> list[Tensor]:
        shape = (rollout.reward.shape[0], self.groups.num_groups)
        uniform = torch.rand(shape, generator=generator("minibatch", self.seed, self.iteration, epoch))
        return self.groups.minibatches(shape[0], self.num_minibatches, uniform)

    def _diverged(self, log: Meter) -> bool:
        """KL early stop; the decision is the same on every rank because its inputs are global sums."""
        return self.target_kl is not None and log.last_approx_kl > self.target_kl

    def _minibatch(self, batch: Batch, rows: Tensor, log: Meter, first: bool) -> None:
        """One optimiser step on `rows` (M,)."""
        self.optimizer.zero_grad()
        log.begin(batch.denominator(rows), first)
        for part, coefficients in self._micro_batches(batch, rows, log):
            self._backward(batch, part, coefficients, log)
        log.end(self.optimizer.step())
        blend = min(self.ema_decay, (1 + self.optimizer.steps) / (10 + self.optimizer.steps))
        self.policy.weights.blend("ema", blend)
        self._critic_step(batch, rows, log)

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
        if coefficients is None:
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
        log.first_ratio(diff)

    def _policy_loss(self, log_ratio: Tensor, evidence: Evidence, batch: Batch, pairs: Pairs, log: Meter) -> Tensor:
        """Clipped surrogate of the ratios (M, R), or (M, 1) when joint, over its global denominator; logged."""
        joint, advantage = self.likelihood.joint, batch.advantage[pairs.rows]
        weight, total = batch.pair_weight(pairs, joint), log.denominator(joint)
        surrogate = losses.clipped_surrogate(log_ratio, advantage, self.clip_low, self.clip_high)
        if self.guard:
            surrogate = surrogate / (evidence.t_next - evidence.t)
        loss = weighted_sum(surrogate, weight) / total
        clipped = losses.clip_fraction(log_ratio.detach(), advantage, self.clip_low, self.clip_high)
        log.add("policy/loss", loss)
        log.add("policy/ratio_mean", weighted_sum(log_ratio.detach().exp(), weight) / total)
        log.add("policy/clip_frac", weighted_sum(clipped, weight) / total)
        return loss

    def _regularizer(self, score: Score, evidence: Evidence, batch: Batch, pairs: Pairs, log: Meter) -> Tensor:
        """beta KL to the reference less the entropy bonus, over their global denominators; logged apart."""
        loss, reduce = score.log_prob.new_zeros(()), self.likelihood.reduce
        if self.kl.beta:
            gain = self._gain(evidence) if self.kl.kind == "velocity" else None
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

    def _gain(self, evidence: Evidence) -> Tensor:
        t, t_next = evidence.t.flatten(), evidence.t_next.flatten()
        return self.policy.kernel.gain(t, t_next).view_as(evidence.t)

    # -- critic -----------------------------------------------------------------------------------

    def _critic_step(self, batch: Batch, rows: Tensor, log: Meter) -> None:
        if self.critic is None or self.critic_optimizer is None:
            return
        assert batch.returns is not None
        with torch.no_grad():  # the critic trains only itself
            cond = batch.cond(rows)
        weight = batch.row_alive[rows]
        total = dist.all_sum(weight.sum()).clamp(min=1.0)
        for step in range(self.critic_steps):
            self.critic_optimizer.zero_grad()
            loss = weighted_sum((self.critic(cond) - batch.returns[rows]).square(), weight) / total
            if step == 0:
                log.extra("critic/loss", loss.detach())
            loss.backward()
            self.critic_optimizer.step()

    @torch.no_grad()
    def values(self, rollout: Rollout, cond: Any) -> tuple[Tensor | None, Tensor | None]:
        """V(obs) and V(next state truly reached), (T, B) each; None without a critic."""
        if self.critic is None:
            return None, None
        shape = rollout.reward.shape
        v = self.critic(cond(torch.arange(rollout.num_rows, device=self.policy.device))).view(shape)
        last = self.critic(self.policy.encode(rollout.last_obs))
        v_next = torch.cat([v[1:], last.unsqueeze(0)])
        if rollout.final_obs is not None:
            final = self.critic(self.policy.encode(rollout.flat(rollout.final_obs))).view(shape)
            v_next = torch.where(rollout.truncated | rollout.terminated, final, v_next)
        return v, v_next

    # -- state ------------------------------------------------------------------------------------

    def set_progress(self, progress: float) -> None:
        """Share of the run that is done, for learning-rate decay."""
        self.optimizer.progress = progress

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs besides the policy and its weight sets."""
        state: dict[str, Any] = {"iteration": self.iteration, "optimizer": self.optimizer.state_dict()}
        if self.critic is not None and self.critic_optimizer is not None:
            state["critic"] = self.critic.state_dict()
            state["critic_optimizer"] = self.critic_optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.iteration = int(state["iteration"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None and self.critic_optimizer is not None:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
