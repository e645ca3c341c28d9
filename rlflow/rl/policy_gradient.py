"""PolicyGradient: Flow-GRPO, MixGRPO, DanceGRPO, CPS, ReinFlow, pi_RL and PPO are this class with other arguments.

    L = E[ max(-A r, -A clip(r, 1 - low, 1 + high)) ] + kl.beta KL(policy || reference) - entropy H + value_coef (V - R)^2

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
from rlflow.rl.advantages import GAE, Advantages, GroupAdvantage
from rlflow.rl.critic import Critic
from rlflow.rl.groups import Groups
from rlflow.rl.likelihood import ChainLikelihood, Score
from rlflow.rl.losses import weighted_sum
from rlflow.rl.optim import AdamW, Optimizer
from rlflow.types import Cond, Evidence, Rollout, tree_map


@dataclass(frozen=True)
class KL:
    """beta x KL to the reference weights; 'released' and 'velocity' are other scales, see losses.reference_kl."""

    beta: float = 0.0
    kind: losses.KLKind = "exact"


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
        value_coef: float = 0.5,
        critic_lr: float = 1e-3,
        ema_decay: float = 0.9,
        seed: int = 0,
    ):
        if clip_low <= 0 or (clip_high is not None and clip_high <= 0):
            raise ValueError("clip_low and clip_high must be positive")
        if guard and likelihood.joint:
            raise ValueError("GRPO-Guard re-scales each denoising step's ratio: use likelihood.joint=false with it")
        if isinstance(advantage, GroupAdvantage) and groups.group_size < 2:
            raise ValueError("a group of 1 has no group advantage: set group_size >= 2, or use advantage=gae (a critic)")
        self.policy, self.likelihood, self.advantage, self.groups = policy, likelihood, advantage, groups
        self.clip_low, self.clip_high = clip_low, clip_low if clip_high is None else clip_high
        self.epochs, self.num_minibatches, self.micro_batch = epochs, num_minibatches, micro_batch
        self.kl, self.guard, self.entropy, self.target_kl = kl or KL(), guard, entropy, target_kl
        self.value_coef, self.ema_decay, self.seed = value_coef, ema_decay, seed
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
        batch = _Batch(self, rollout)
        log = _Log()
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

    def _diverged(self, log: _Log) -> bool:
        """KL early stop; the decision is the same on every rank because its inputs are global sums."""
        return self.target_kl is not None and log.last_approx_kl > self.target_kl

    def _minibatch(self, batch: _Batch, rows: Tensor, log: _Log, first: bool) -> None:
        """One optimiser step on `rows` (M,)."""
        self.optimizer.zero_grad()
        log.begin(batch.denominator(rows), first)
        for part, coefficients in self._micro_batches(batch, rows):
            self._backward(batch, part, coefficients, log)
        log.end(self.optimizer.step())
        blend = min(self.ema_decay, (1 + self.optimizer.steps) / (10 + self.optimizer.steps))
        self.policy.weights.blend("ema", blend)
        self._critic_step(batch, rows, log)

    def _micro_batches(self, batch: _Batch, rows: Tensor) -> Iterator[tuple[_Pairs, Tensor | None]]:
        """Pieces of (row, column) pairs of one network pass each.

        Whole rows where R fits. A joint ratio that does not fit is scored first without gradient;
        c = dL / dlogp then stands in for it, which gives the one-graph gradient exactly.
        """
        r = batch.num_columns
        if r <= self.micro_batch:
            for part in rows.split(max(1, self.micro_batch // r)):
                yield _Pairs(part, None), None
            return
        grid = torch.cartesian_prod(rows, torch.arange(r, device=rows.device))
        pairs = [_Pairs(p[:, 0], p[:, 1]) for p in grid.split(self.micro_batch)]
        if not self.likelihood.joint:
            yield from ((p, None) for p in pairs)
            return
        with torch.no_grad():
            log_prob = torch.cat([self._score(batch, p)[0].log_prob for p in pairs]).reshape(-1, r)
        leaf = log_prob.requires_grad_()
        everything = _Pairs(rows, None)
        surrogate = self._surrogate(leaf, None, batch.evidence_of(everything), batch.advantage[rows])
        (c,) = torch.autograd.grad(weighted_sum(surrogate, batch.pair_weight(everything, joint=True)), leaf)
        yield from zip(pairs, c.reshape(-1, 1).split(self.micro_batch), strict=True)

    def _score(self, batch: _Batch, pairs: _Pairs) -> tuple[Score, Evidence]:
        evidence = batch.evidence_of(pairs)
        return self.likelihood.score(self.policy, batch.cond(pairs.rows), evidence), evidence

    def _backward(self, batch: _Batch, pairs: _Pairs, coefficients: Tensor | None, log: _Log) -> None:
        score, evidence = self._score(batch, pairs)
        advantage = batch.advantage[pairs.rows]
        weight = batch.pair_weight(pairs, joint=False)
        if coefficients is None:
            joint = self.likelihood.joint
            surrogate = self._surrogate(score.log_prob, score, evidence, advantage)
            policy_loss = weighted_sum(surrogate, batch.pair_weight(pairs, joint)) / log.denominator(joint)
        else:
            policy_loss = (coefficients * score.log_prob).sum() / log.denominator(True)
        loss, kl, entropy = policy_loss, None, None
        if self.kl.beta:
            gain = self._gain(evidence) if self.kl.kind == "velocity" else None
            kl = losses.reference_kl(self.kl.kind, score.dist, evidence, self.likelihood.reduce, gain)
            loss = loss + self.kl.beta * weighted_sum(kl, batch.alive(pairs)) / log.alive
        if self.entropy:
            entropy = score.dist.entropy(self.likelihood.reduce, batch_dims=2)
            loss = loss - self.entropy * weighted_sum(entropy, weight) / log.denominator(False)
        loss.backward()
        with torch.no_grad():
            self._record(log, score, evidence, advantage, weight, policy_loss, kl, entropy, batch.alive(pairs))

    def _surrogate(self, log_prob: Tensor, score: Score | None, evidence: Evidence, advantage: Tensor) -> Tensor:
        """Clipped surrogate (M, R), or (M, 1) when joint."""
        log_ratio = self.likelihood.log_ratio(log_prob, evidence)
        if not self.guard:
            return losses.clipped_surrogate(log_ratio, advantage, self.clip_low, self.clip_high)
        assert score is not None
        log_ratio = losses.guard_log_ratio(log_ratio, score, evidence, self.likelihood.reduce)
        surrogate = losses.clipped_surrogate(log_ratio, advantage, self.clip_low, self.clip_high)
        return surrogate / (evidence.t_next - evidence.t)

    def _gain(self, evidence: Evidence) -> Tensor:
        t, t_next = evidence.t.flatten(), evidence.t_next.flatten()
        return self.policy.kernel.gain(t, t_next).view_as(evidence.t)

    def _record(
        self,
        log: _Log,
        score: Score,
        evidence: Evidence,
        advantage: Tensor,
        weight: Tensor,
        policy_loss: Tensor,
        kl: Tensor | None,
        entropy: Tensor | None,
        alive: Tensor,
    ) -> None:
        diff = torch.where(evidence.valid, score.log_prob - evidence.old_log_prob, 0.0)
        clipped = losses.clip_fraction(diff, advantage, self.clip_low, self.clip_high)
        log.add("policy/loss", policy_loss)
        log.add("policy/ratio_mean", weighted_sum(diff.exp(), weight) / log.denominator(False))
        log.add("policy/clip_frac", weighted_sum(clipped, weight) / log.denominator(False))
        log.add("policy/approx_kl", weighted_sum(torch.expm1(diff) - diff, weight) / log.denominator(False))
        if kl is not None:
            log.add("kl/ref", weighted_sum(kl, alive) / log.alive)
        if entropy is not None:
            log.add("policy/entropy", weighted_sum(entropy, weight) / log.denominator(False))
        log.first_ratio(diff)

    # -- critic -----------------------------------------------------------------------------------

    def _critic_step(self, batch: _Batch, rows: Tensor, log: _Log) -> None:
        if self.critic is None or self.critic_optimizer is None:
            return
        assert batch.returns is not None
        self.critic_optimizer.zero_grad()
        weight = batch.row_alive[rows]
        error = (self.critic(batch.cond(rows).map(torch.Tensor.detach)) - batch.returns[rows]).square()
        loss = weighted_sum(error, weight) / dist.all_sum(weight.sum()).clamp(min=1.0)
        (self.value_coef * loss).backward()
        self.critic_optimizer.step()
        log.extra("critic/loss", loss.detach())

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


@dataclass(frozen=True)
class _Pairs:
    """Rows (M,) with all their columns, or with one column each (M,)."""

    rows: Tensor
    columns: Tensor | None


class _Batch:
    """One rollout, flattened to N rows, with its advantages and (if asked for) reference means."""

    def __init__(self, learner: PolicyGradient, rollout: Rollout):
        self.policy, self.rollout, self.joint = learner.policy, rollout, learner.likelihood.joint
        self.obs = None if rollout.cond is not None else rollout.flat(rollout.obs)
        assert rollout.evidence is not None
        self.evidence = rollout.evidence
        self.num_columns = self.evidence.t.shape[1]
        with torch.no_grad():
            out: Advantages = learner.advantage(rollout, *learner.values(rollout, self.cond))
        self.advantage = out.advantage.reshape(-1, 1)
        self.row_weight = out.weight.reshape(-1)
        self.row_alive = rollout.weight.reshape(-1)
        self.returns = None if out.returns is None else out.returns.reshape(-1)
        if learner.kl.beta:
            self.evidence = learner.likelihood.with_reference(
                self.policy, self.cond, self.evidence, learner.micro_batch
            )

    def cond(self, rows: Tensor) -> Cond:
        """Cond of rows (M,): kept from the rollout when the encoder is frozen, else encoded now."""
        if self.rollout.cond is not None:
            return self.rollout.cond.index(rows)
        unique, inverse = torch.unique(rows, return_inverse=True) if rows.numel() > 1 else (rows, rows * 0)
        return self.policy.encode(tree_map(lambda v: v[unique], self.obs)).index(inverse)

    def evidence_of(self, pairs: _Pairs) -> Evidence:
        """(M, R, ...) of whole rows or (M, 1, ...) of single pairs."""
        if pairs.columns is None:
            return self.evidence.index(pairs.rows)
        return self.evidence.pairs(pairs.rows, pairs.columns)

    def _valid(self, pairs: _Pairs) -> Tensor:
        valid = self.evidence.valid[pairs.rows]
        return valid if pairs.columns is None else valid.gather(1, pairs.columns.unsqueeze(1))

    def pair_weight(self, pairs: _Pairs, joint: bool) -> Tensor:
        """(M, R) weights of pairs with a usable advantage; (M, 1) for joint ratios."""
        weight = self.row_weight[pairs.rows].unsqueeze(1)
        return weight if joint else weight * self._valid(pairs)

    def alive(self, pairs: _Pairs) -> Tensor:
        """(M, R) weights of every sampled pair, zero advantage or not: what the KL term averages over."""
        return self.row_alive[pairs.rows].unsqueeze(1) * self._valid(pairs)

    def denominator(self, rows: Tensor) -> Tensor:
        """Global sums (3,): pair weights, joint weights, alive pairs."""
        everything = _Pairs(rows, None)
        local = [self.pair_weight(everything, False), self.pair_weight(everything, True), self.alive(everything)]
        return dist.all_sum(torch.stack([w.sum() for w in local]))

    def metrics(self) -> dict[str, float]:
        """Share of rows that took part, and the size of their advantages; over all ranks."""
        used = (self.row_weight > 0).to(self.row_alive.dtype)
        masked = (self.row_alive == 0).to(used.dtype)
        size = weighted_sum(self.advantage[:, 0].abs(), self.row_weight)
        sums = torch.stack([used.sum(), masked.sum(), size, self.row_weight.sum(), torch.ones_like(used).sum()])
        used_sum, masked_sum, size_sum, weight_sum, total = dist.all_sum(sums).tolist()
        return {
            "advantage/used_frac": used_sum / total,
            "advantage/abs_mean": size_sum / max(weight_sum, 1e-12),
            "rollout/masked_frac": masked_sum / total,
        }


class _Log:
    """Sums of per-micro-batch numbers, kept on the device; reduced over ranks once per optimiser step."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self.last_approx_kl = 0.0
        self.first: Tensor | None = None
        self.first_by_step: Tensor | None = None

    def begin(self, sums: Tensor, first: bool) -> None:
        self.sums, self.values, self.extras = sums, {}, {}
        self.alive, self.is_first = sums[2].clamp(min=1e-12), first

    def denominator(self, joint: bool) -> Tensor:
        return self.sums[1 if joint else 0].clamp(min=1e-12)

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self.values[name] = self.values[name] + value if name in self.values else value

    def extra(self, name: str, value: Tensor) -> None:
        self.history[-1][name] = float(dist.all_sum(value))

    def first_ratio(self, diff: Tensor) -> None:
        """Largest |log ratio| before any weight has changed, per column."""
        if self.is_first:
            worst = diff.abs().amax(0)
            same = self.first_by_step is not None and self.first_by_step.shape == worst.shape
            self.first_by_step = torch.maximum(self.first_by_step, worst) if same else worst
            top = worst.max()
            self.first = top if self.first is None else torch.maximum(self.first, top)

    def end(self, grad_norm: float) -> None:
        names = list(self.values)
        summed = dist.all_sum(torch.stack([self.values[n].double() for n in names])).tolist()
        row = dict(zip(names, summed, strict=True)) | {"optim/grad_norm": grad_norm}
        self.last_approx_kl = row["policy/approx_kl"]
        self.history.append(row)

    def metrics(self) -> dict[str, float]:
        """Means over the iteration's optimiser steps, and the first log-ratio."""
        names = {n for row in self.history for n in row}
        out = {}
        for name in sorted(names):
            seen = [row[name] for row in self.history if name in row and row[name] == row[name]]
            out[name] = sum(seen) / len(seen) if seen else float("nan")
        assert self.first is not None and self.first_by_step is not None
        out["policy/first_log_ratio_max"] = float(dist.all_max(self.first))
        for k, worst in enumerate(self.first_by_step.tolist()):
            out[f"policy/first_log_ratio/{k}"] = worst
        return out
