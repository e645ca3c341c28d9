"""SAC: off-policy learning with the gradient through every denoising step (SAC Flow, 2025; Haarnoja et al. 2018).

    critic   1/2 (Q_e(s, a) - y)^2,   y = R + discount (min_e Q'_e(s', a') - alpha log p(path'))
    actor    E[ alpha log p(path) - min_e Q_e(s, a) ] + anchor E|a - a_data|^2,   a = squash(x_K), x_K from `sample`
    alpha    -log alpha E[ log p(path) + H_target ]

Reparameterised, log N(x_{k+1}; mean_k, std_k) is a function of std_k and of the noise: it gives no gradient to the
velocity. Only Q and the squash move that; the entropy term proper trains the noise. A Gaussian actor is the case K = 1
of a field that forgets x_0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlflow.flow.noise import generator
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import Steps
from rlflow.parallel import dist
from rlflow.rl.masked import weighted_sum
from rlflow.rl.off_policy.offline import Offline, clone
from rlflow.rl.off_policy.path_entropy import entropy_target, path_log_prob
from rlflow.rl.off_policy.replay import Replay, Transitions
from rlflow.rl.off_policy.temperature import Temperature
from rlflow.rl.off_policy.twin import Twin, TwinSettings
from rlflow.rl.optim import AdamW, Deferred
from rlflow.rl.recorded import Recorded
from rlflow.types import Cond, Rollout, Tree


@dataclass(frozen=True)
class Acted:
    """What the policy did at N observations: actions (N, *D) after the squash, log p(path) (N,), noise std."""

    action: Tensor
    log_prob: Tensor
    std: Tensor


class SAC:
    """`update(rollout)` stores the rollout and makes the optimiser steps that are due.

    `permute` makes the control: a decision drawn from the replay is paid what another, drawn apart, was. Shuffled
    inside their rollout alone, rewards still rise with the policy that earned them, and the replay learns from that.
    """

    sample_with = "live"
    keep_path = 0

    def __init__(
        self,
        policy: FlowPolicy,
        steps: Steps,
        replay: Replay,
        *,
        optimizer: AdamW | None = None,
        twin: TwinSettings | None = None,
        batch_size: int = 256,
        start: int = 5000,
        updates_per_step: float = 1.0,
        actor_every: int = 1,
        alpha: float = 0.2,
        alpha_lr: float = 3e-4,
        target_entropy: float | None = None,
        anchor: float = 0.0,
        offline: Offline | None = None,
        ema_decay: float = 0.9,
        seed: int = 0,
        permute: bool = False,
        relabel: Callable[[Transitions], Transitions] | None = None,
    ):
        if dist.world() > 1:
            raise ValueError("SAC keeps one replay in one process: start it with --processes 1")
        if offline is not None:
            offline.check(policy)
        grid = policy.grid(policy.num_steps)
        self.plan = steps(0, grid, torch.zeros(1, dtype=torch.long))
        if self.plan.scored.ndim > 1 or not bool(self.plan.scored.all()):
            raise ValueError("SAC differentiates through, and scores, every denoising step: use steps=all")
        self.policy, self.replay, self.seed, self.permute = policy, replay, seed, permute
        self.relabel = relabel
        self.batch_size, self.start, self.updates_per_step = batch_size, start, updates_per_step
        self.actor_every, self.anchor, self.ema_decay, self.offline = actor_every, anchor, ema_decay, offline
        target = entropy_target(policy, target_entropy)
        num_inputs = policy.field.num_features + torch.Size(policy.event_shape).numel()
        self.twin = Twin(num_inputs, twin or TwinSettings(), policy.device, policy.dtype, policy.autocast)
        self.temperature = Temperature(target, alpha, alpha_lr, policy.device)
        settings = optimizer or AdamW(lr=3e-4, betas=(0.9, 0.999), max_grad_norm=0.0)
        self.optimizer = Deferred([p for p in policy.parameters() if p.requires_grad], settings, "algorithm.lr")
        moving = [*self.optimizer.parameters, *self.twin.moving, self.temperature.log]
        self._critic, self._actor = (
            Recorded(fn, policy, moving) for fn in (self.critic_gradients, self.actor_gradients)
        )
        policy.weights.snapshot("ema")
        self.iteration, self.seen, self.updates = 0, 0, 0

    # -- one iteration ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Clone the demonstrations, then learn from them alone; without any, nothing."""
        if self.offline is None:
            return
        clone(self.policy, self.offline, self.batch_size, self.seed)
        self._renew()
        for _ in range(self.offline.updates):
            self.step()
        self._settle()
        self.policy.weights.snapshot("ema")

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Store a rollout and learn; returns metrics, nan where no step was due yet."""
        self.replay.add(rollout, self.policy.squash(rollout.action))
        due = self.due(rollout.num_rows)
        self.seen += rollout.num_rows
        self._renew()
        history = [self.step() for _ in range(due)]
        self._settle()
        self.policy.field.unguided.observe(rollout.flat(rollout.obs))
        self.policy.weights.blend("ema", self.ema_decay)
        self.iteration += 1
        return _means(history) | self._counters()

    def _renew(self) -> None:
        for recorded in (self._critic, self._actor):
            recorded.renew()

    def _settle(self) -> None:
        for optimizer in (self.optimizer, self.twin.optimizer, self.temperature.optimizer):
            optimizer.settle()

    @property
    def micro_batch(self) -> int:
        """Rows of one network pass."""
        return self.batch_size

    def due(self, rows: int) -> int:
        """Optimiser steps after `rows` more decisions: those beyond the first `start` call for them."""
        first = 0 if self.offline is None else self.offline.updates
        return max(0, int(self.updates_per_step * (self.seen + rows - self.start)) - self.updates + first)

    def step(self) -> dict[str, Tensor]:
        """One of the optimisers, whether due or not; its numbers, on the device."""
        batch, (target, actor) = self._batch(), self.noise(self.batch_size)
        rows = vars(batch)
        gradients, cond, out = self._critic(rows, target)
        self.twin.step(gradients)
        if self.updates % self.actor_every == 0:
            out |= self._actor_step(rows, cond, actor)
        self.updates += 1
        return out

    def noise(self, num: int) -> Tensor:
        """Of this update, (2, K + 1, num, *D): for the target's actions and the actor's, each x_0's and the steps'."""
        rng = generator("sac/noise", self.seed, self.updates, device=self.policy.device)
        shape = (2, self.plan.num_steps + 1, num, *self.policy.event_shape)
        return torch.randn(shape, generator=rng, dtype=self.policy.dtype, device=self.policy.device)

    def _batch(self) -> Transitions:
        self.twin.redraw(generator("sac/critics", self.seed, self.updates))  # this step's critics with this step's rows
        rng = generator("sac/replay", self.seed, self.updates)
        batch = self._draw(rng)
        if not self.permute:
            return batch
        other = self._draw(rng)
        if self.offline is not None:  # in both draws the demonstrations stand first
            other = other.index(torch.randperm(len(other), generator=rng).to(self.policy.device))
        return batch.paid_as(other)

    def _draw(self, rng: torch.Generator) -> Transitions:
        """A batch, paid by the rewards of today where they are learnt: those in the replay are stale."""
        batch = self._stored(rng)
        return batch if self.relabel is None else self.relabel(batch)

    def _stored(self, rng: torch.Generator) -> Transitions:
        num = self.batch_size
        if self.offline is None:
            return self.replay.at(self.replay.draw(num, rng).to(self.policy.device))
        if not len(self.replay):
            return self.offline.draw(num, rng)
        old = round(self.offline.share * num)
        new = self.replay.at(self.replay.draw(num - old, rng).to(self.policy.device))
        return Transitions.cat(self.offline.draw(old, rng), new)

    def act(self, cond: Cond, noise: Tensor) -> Acted:
        """Sample at `cond` (N) with noise (K + 1, N, *D); gradients are the caller's choice."""
        chain = self.policy.sample(cond, self.plan, x_0=noise[0], step_noise=noise[1:])
        return Acted(self.policy.squash(chain.final), path_log_prob(self.policy, chain), chain.std)

    @torch.no_grad()
    def target(self, batch: Transitions, noise: Tensor) -> Tensor:
        """y (N,)."""
        cond = self.policy.encode(batch.next_obs)
        acted = self.act(cond, noise)
        value = self.twin.target_value(cond, acted.action) - self.temperature.value * acted.log_prob
        return batch.reward + torch.where(batch.discount > 0, batch.discount * value, 0.0)

    def actor_loss(self, cond: Cond, batch: Transitions, noise: Tensor) -> tuple[Tensor, Acted, Tensor]:
        """(loss, what was done, squared distance to the data's actions)."""
        acted = self.act(cond, noise)
        each = (acted.action - batch.action).square().flatten(2).mean(2)
        distance = torch.where(batch.counts > 0, each, 0.0).sum(1) / batch.counts.sum(1)
        per_row = self.temperature.value * acted.log_prob - self.twin.value(cond, acted.action)
        per_row = per_row + self.anchor * distance
        return _mean(per_row, batch.weight), acted, distance

    def critic_gradients(
        self, rows: dict[str, Tree], noise: Tensor
    ) -> tuple[Sequence[Tensor], Tree, dict[str, Tensor]]:
        """(by the critics' weights, what the actor needs of the condition, numbers for the log); recorded."""
        batch, encoder_trains = Transitions(**rows), self.policy.encoder_trains
        with torch.no_grad():
            cond = self.policy.encode(batch.obs)
        target = self.target(batch, noise)
        loss = self.twin.loss(cond, batch.action, target, batch.weight)
        gradients = torch.autograd.grad(loss, self.twin.optimizer.parameters)
        told = {"critic/loss": loss.detach(), "critic/target_mean": _mean(target, batch.weight)}
        return gradients, {} if encoder_trains else cond.data, told

    def actor_gradients(
        self, rows: dict[str, Tree], cond: dict[str, Tensor], noise: Tensor
    ) -> tuple[Sequence[Tensor], Tensor, dict[str, Tensor]]:
        """(by the policy's weights, mean log p, numbers for the log); recorded. An encoder that trains runs here."""
        batch = Transitions(**rows)
        loss, acted, distance = self.actor_loss(Cond(cond) if cond else self.policy.encode(batch.obs), batch, noise)
        gradients = torch.autograd.grad(loss, self.optimizer.parameters, materialize_grads=True)  # none for the critics
        log_prob = _mean(acted.log_prob.detach(), batch.weight)
        told = {
            "policy/loss": loss.detach(),
            "policy/entropy": -log_prob,
            "policy/anchor": _mean(distance.detach(), batch.weight),
            "policy/std_mean": acted.std.detach().mean(),
        }
        return gradients, log_prob, told

    def _actor_step(self, rows: dict[str, Tree], cond: dict[str, Tensor], noise: Tensor) -> dict[str, Tensor]:
        gradients, log_prob, out = self._actor(rows, cond, noise)
        norm = self.optimizer.advance(gradients)
        self.temperature.fit(log_prob)
        return out | {"optim/grad_norm": norm}

    def _counters(self) -> dict[str, float]:
        return {
            "policy/alpha": float(self.temperature.value),
            "optim/lr": self.optimizer.learning_rate(),
            "optim/steps": float(self.optimizer.steps),
            "optim/skipped_steps": float(self.optimizer.skipped + self.twin.optimizer.skipped),
            "replay/size": float(len(self.replay)),
        }

    # -- state ------------------------------------------------------------------------------------

    def set_progress(self, progress: float) -> None:
        """Share of the run that is done, for schedules."""
        self.optimizer.progress = progress
        self.policy.kernel.set_progress(progress)

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs besides the policy and its weight sets; the replay with it."""
        return {
            "counters": {"iteration": self.iteration, "seen": self.seen, "updates": self.updates},
            "optimizer": self.optimizer.state_dict(),
            "twin": self.twin.state_dict(),
            "temperature": self.temperature.state_dict(),
            "replay": self.replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name, value in state["counters"].items():
            setattr(self, name, int(value))
        self.optimizer.load_state_dict(state["optimizer"])
        self.twin.load_state_dict(state["twin"])
        self.temperature.load_state_dict(state["temperature"])
        self.replay.load_state_dict(state["replay"], self.policy.device)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Of values (N,) that count, by weight (N,)."""
    return weighted_sum(values, weight) / weight.sum().clamp(min=1e-12)


def _means(history: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each number over the steps that have it, read from the device at once."""
    names = sorted({name for row in history for name in row})
    columns = [torch.stack([row[n] for row in history if n in row]).double().mean() for n in names]
    return dict(zip(names, torch.stack(columns).tolist(), strict=True)) if names else {}
