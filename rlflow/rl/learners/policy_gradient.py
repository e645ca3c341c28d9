"""PolicyGradient: one iteration of Flow-GRPO, MixGRPO, DanceGRPO, CPS, ReinFlow, pi_RL, FPO, NFT, PPO and others.

    L = E[ objective ] + beta KL(policy || reference) + norm_guard E[ max(0, |v| - |v_ref|) ] - entropy H
        + anchor E[ |action - reference's action|^2 ]

over (row, column) pairs of recorded evidence. objectives/ has the objectives, regularizers.py and anchor.py the rest,
critic.py the critic of an advantage that needs one. Every expectation is a weighted mean whose denominator is
summed over micro-batches and ranks first, so neither changes the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlflow.flow.noise import Key, generator
from rlflow.flow.policy import FlowPolicy
from rlflow.rl.advantages import Advantage, moments
from rlflow.rl.anchor import Anchor
from rlflow.rl.batch import Batch, Meter, Pairs
from rlflow.rl.critic import CriticLearner, explained_variance
from rlflow.rl.groups import Groups
from rlflow.rl.learners.loss import Loss, RowGradients, apart, reuses, row_tensors
from rlflow.rl.learners.pieces import Later, pieces
from rlflow.rl.learners.regularizers import KL, Regularizers, velocity_norm
from rlflow.rl.likelihoods.base import Likelihood, Score
from rlflow.rl.masked import weighted_sum
from rlflow.rl.objectives.base import Objective
from rlflow.rl.objectives.clip import Clip
from rlflow.rl.optim import AdamW, Optimizer
from rlflow.rl.recorded import Recorded, small
from rlflow.types import Evidence, Rollout


class PolicyGradient:
    """Descent of an objective over any likelihood, clipped ratios by default; `update(rollout)` is one iteration."""

    keep_path = 0

    def __init__(
        self,
        policy: FlowPolicy,
        likelihood: Likelihood,
        advantage: Advantage,
        groups: Groups,
        *,
        objective: Objective | None = None,
        optimizer: AdamW | None = None,
        epochs: int = 1,
        num_minibatches: int = 1,
        micro_batch: int = 256,
        kl: KL | None = None,
        norm_guard: float = 0.0,
        entropy: float = 0.0,
        anchor: float = 0.0,
        critic_steps: int = 1,
        critic_lr: float = 1e-3,
        critic_width: int = 128,
        critic_warmup: int = 0,
        ema_decay: float = 0.9,
        seed: int = 0,
    ):
        advantage.check(groups)
        self.policy, self.likelihood, self.advantage, self.groups = policy, likelihood, advantage, groups
        self.objective = objective or Clip(likelihood)
        self.objective.attach(policy)
        self.sample_with = self.objective.sample_with
        if critic_warmup and not (advantage.needs_critic or self.objective.has_critic):
            raise ValueError(f"{type(advantage).__name__} has no critic to warm up: use critic_warmup=0")
        regularizers = Regularizers(policy, likelihood, kl or KL(), norm_guard, entropy)
        self.loss = Loss(likelihood, self.objective, regularizers)
        self.epochs, self.num_minibatches, self.micro_batch = epochs, num_minibatches, micro_batch
        self.anchor = anchor
        self.needs_reference = regularizers.needs_reference or self.objective.needs_reference
        self.critic_warmup, self.ema_decay, self.seed = critic_warmup, ema_decay, seed
        self.optimizer = Optimizer([p for p in policy.parameters() if p.requires_grad], optimizer or AdamW())
        self._recorded: Recorded | None = None
        self.reuses = reuses(policy, likelihood, self.sample_with)
        self._unchanged = False  # since the samples: what was constant in them is so in their scores
        fixed = self.objective.fixed and not self.reuses
        if fixed and not policy.encoder_trains and small(policy, self.optimizer.parameters):
            of_rows = RowGradients(policy, self.loss, self.optimizer.parameters)
            owners = self.objective, regularizers, likelihood
            self._recorded = Recorded(of_rows, policy, self.optimizer.parameters, owners)
        self.critic: CriticLearner | None = None
        if advantage.needs_critic:
            self.critic = CriticLearner(policy, lr=critic_lr, steps=critic_steps, width=critic_width)
        for name in ("ema", *(("ref",) if self.needs_reference or anchor else ()), *self.objective.weight_sets):
            policy.weights.snapshot(name)
        self.iteration = 0

    # -- one iteration ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Nothing to do before the first iteration."""

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Improve the policy on one rollout; returns metrics."""
        batch = self._prepare(rollout)
        if self._recorded is not None:
            self._recorded.renew()
        log, stop, self._unchanged = Meter(), False, self.reuses
        for epoch in range(self.epochs):
            for index, rows in enumerate(self._minibatches(rollout, epoch)):
                self._minibatch(batch, rows.to(self.policy.device), log, first=epoch == 0 and index == 0)
            if stop := not self._warming_up and self.objective.stop(lambda name: log.mean(name, self.num_minibatches)):
                break
        self.policy.field.unguided.observe(rollout.flat(rollout.obs))
        self.objective.after(self.policy, self.optimizer.steps)
        self.iteration += 1
        return log.metrics() | batch.metrics | {"policy/early_stop": float(stop)} | self.optimizer.counters()

    @torch.no_grad()
    def _prepare(self, rollout: Rollout) -> Batch:
        """Advantages, and what the reference says where a term needs it: once per iteration."""
        batch = Batch(self.policy, rollout)
        values: Tensor | None = None
        next_values: Tensor | None = None
        if self.critic is not None:
            values, next_values = self.critic.values(rollout, batch.cond, self.micro_batch)
        batch.set_advantages(self.advantage(rollout, values, next_values), self.likelihood.joint)
        if values is not None:
            explained = explained_variance(values.flatten(), batch.returns, batch.row_alive)
            batch.metrics["critic/explained_variance"] = explained
        if self.likelihood.scores_steps and self.policy.kernel.learns_std:
            std = batch.evidence.old_std.flatten(1).mean(1)
            batch.metrics["policy/std_mean"] = float(moments(std, batch.row_alive)[0])
        norm = velocity_norm(self.policy, self.likelihood, batch.evidence, batch.evidence.old_mean).mean(1)
        batch.metrics["policy/velocity_norm"] = float(moments(norm, batch.row_alive)[0])
        if rollout.num_steps is not None:
            batch.evidence = self.likelihood.executed(
                batch.evidence, rollout.num_steps.flatten(), self.policy.field.unguided.num_actions
            )
        if self.needs_reference:
            batch.evidence = self.likelihood.with_reference(self.policy, batch.cond, batch.evidence, self.micro_batch)
        if self.anchor:
            key, rows = Key(self.seed, "anchor", self.iteration), rollout.row_ids.flatten()
            batch.anchor = Anchor.at(self.policy, batch.cond, rows, key, self.micro_batch)
        self.objective.prepare(batch)
        return batch

    def _minibatches(self, rollout: Rollout, epoch: int) -> list[Tensor]:
        horizon = rollout.reward.shape[0]
        g = generator("minibatch", self.seed, self.iteration, epoch)
        uniform = torch.rand(self.groups.num_groups * horizon, generator=g)
        return self.groups.minibatches(horizon, self.num_minibatches, uniform)

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
        for name, value in self.objective.learn(batch, rows).items():
            log.add(name, value)
        log.end(norm)

    def _policy_step(self, batch: Batch, rows: Tensor, log: Meter) -> float:
        self.optimizer.zero_grad()
        for part, coefficients in self._pieces(batch, rows, log):
            self._backward(batch, part, coefficients, log)
        if batch.anchor is not None:
            for part in rows.split(max(1, self.micro_batch // self.policy.num_steps)):
                self._anchor_backward(batch, batch.anchor, part, log)
        norm, self._unchanged = self.optimizer.step(), False
        blend = min(self.ema_decay, (1 + self.optimizer.steps) / (10 + self.optimizer.steps))
        self.policy.weights.blend("ema", blend)
        return norm

    def _pieces(self, batch: Batch, rows: Tensor, log: Meter) -> Iterator[tuple[Pairs, Later | None]]:
        """Of one network pass each."""
        r, whole = batch.num_columns, Pairs(rows, None)
        if r > self.micro_batch and self.objective.whole_rows:
            raise ValueError(
                f"algorithm.micro_batch: {type(self.objective).__name__} needs the {r} columns of a sample in one pass"
            )

        def loss(score: Score) -> Tensor:
            return self.loss.of_objective(score, batch.evidence_of(whole), batch, whole, log)

        return pieces(rows, r, self.micro_batch, self.likelihood.joint, lambda p: self._score(batch, p)[0], loss)

    def _score(self, batch: Batch, pairs: Pairs) -> tuple[Score, Evidence]:
        evidence = batch.evidence_of(pairs)
        scored = replace(evidence, constant=batch.constant_of(pairs)) if self._unchanged else evidence
        return self.likelihood.score(self.policy, batch.cond(pairs.rows), scored), evidence

    def _backward(self, batch: Batch, pairs: Pairs, later: Later | None, log: Meter) -> None:
        if self._recorded is not None and later is None and pairs.columns is None:
            self._add_gradients(self._recorded, batch, pairs.rows, log)
            return
        score, evidence = self._score(batch, pairs)
        loss = self.loss.of_objective(score, evidence, batch, pairs, log) if later is None else later(score)
        (loss + self.loss.regularizers.loss(score, evidence, batch, pairs, log)).backward()
        self._first_ratio(apart(score, evidence), log)

    def _first_ratio(self, log_ratios: Tensor, log: Meter) -> None:
        if self.sample_with == "live" or self.iteration == 0:  # else the samples are of other weights
            log.first_ratio(log_ratios)

    def _add_gradients(self, recorded: Recorded, batch: Batch, rows: Tensor, log: Meter) -> None:
        found, told, ratios = recorded(*row_tensors(batch, rows), log.sums)
        for p, gradient in zip(self.optimizer.parameters, found, strict=True):
            p.grad = gradient if p.grad is None else p.grad + gradient
        for name, value in told.items():
            log.add(name, value)
        self._first_ratio(ratios, log)

    def _anchor_backward(self, batch: Batch, anchor: Anchor, rows: Tensor, log: Meter) -> None:
        weight, total = batch.row_alive[rows], log.rows
        distance = weighted_sum(anchor.distance(batch.cond(rows), rows), weight) / total
        log.add("policy/anchor", distance)
        (self.anchor * distance).backward()

    # -- state ------------------------------------------------------------------------------------

    def set_progress(self, progress: float) -> None:
        """Share of the run that is done, for schedules: before a rollout, so that its update sees the same kernel."""
        self.optimizer.progress = progress
        self.policy.kernel.set_progress(progress)

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs besides the policy and its weight sets."""
        state: dict[str, Any] = {"iteration": self.iteration, "optimizer": self.optimizer.state_dict()}
        if own := self.objective.state_dict():
            state["objective"] = own
        if self.critic is not None:
            state["critic"] = self.critic.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.iteration = int(state["iteration"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.load_state_dict(state.get("objective", {}))
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
