"""The part of off-policy learning that every actor shares: replay, critics, demonstrations, and when a step is due."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlflow.flow.noise import generator
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import Steps
from rlflow.parallel import dist
from rlflow.rl.masked import weighted_sum
from rlflow.rl.off_policy.offline import Offline, clone, drawn, paid_at_random
from rlflow.rl.off_policy.replay import Replay, Transitions
from rlflow.rl.off_policy.twin import Twin, TwinSettings
from rlflow.rl.optim import AdamW, Deferred
from rlflow.rl.recorded import Recorded
from rlflow.types import Cond, Rollout, Tree


class OffPolicy(ABC):
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
        offline: Offline | None = None,
        ema_decay: float = 0.9,
        seed: int = 0,
        permute: bool = False,
        relabel: Callable[[Transitions], Transitions] | None = None,
    ):
        if dist.world() > 1:
            raise ValueError(f"{type(self).__name__} keeps one replay in one process: start it with --processes 1")
        if offline is not None:
            offline.check(policy)
        self.plan = steps(0, policy.grid(policy.num_steps), torch.zeros(1, dtype=torch.long))
        self.policy, self.replay, self.seed, self.permute = policy, replay, seed, permute
        self.relabel = relabel
        self.batch_size, self.start, self.updates_per_step = batch_size, start, updates_per_step
        self.actor_every, self.ema_decay, self.offline = actor_every, ema_decay, offline
        num_inputs = policy.field.num_features + torch.Size(policy.event_shape).numel()
        self.twin = Twin(num_inputs, twin or TwinSettings(), policy.device, policy.dtype, policy.autocast)
        self.optimizer_settings = optimizer or AdamW(lr=3e-4, betas=(0.9, 0.999), max_grad_norm=0.0)
        trained = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = Deferred(trained, self.optimizer_settings, "algorithm.lr")
        policy.weights.snapshot("ema")
        self.iteration, self.seen, self.updates = 0, 0, 0

    def record(self, moving: Sequence[Tensor] = ()) -> None:
        """Last in a constructor: `moving` is what a step changes besides the policy and the critics."""
        every = [*self.optimizer.parameters, *self.twin.moving, *moving]
        self._critic, self._actor = (
            Recorded(fn, self.policy, every) for fn in (self.critic_gradients, self.actor_gradients)
        )

    # -- one iteration ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Clone the demonstrations, then learn from them alone; without any, nothing."""
        if self.offline is None:
            return
        clone(self.policy, self.offline, self.batch_size, self.seed)
        self.cloned()
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
        return means(history) | self.counters()

    def _renew(self) -> None:
        for recorded in (self._critic, self._actor):
            recorded.renew()

    def _settle(self) -> None:
        for optimizer in self.optimizers:
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

    def _actor_step(self, rows: dict[str, Tree], cond: dict[str, Tensor], noise: Any) -> dict[str, Tensor]:
        gradients, told, out = self._actor(rows, cond, noise)
        norm = self.optimizer.advance(gradients)
        self.after_actor(told)
        return out | {"optim/grad_norm": norm}

    def _batch(self) -> Transitions:
        self.twin.redraw(generator("sac/critics", self.seed, self.updates))  # this step's critics with this step's rows
        rng = generator("sac/replay", self.seed, self.updates)
        batch = self._draw(rng)
        if not self.permute:
            return batch
        return paid_at_random(batch, self._draw(rng), self.offline is not None, rng)

    def _draw(self, rng: torch.Generator) -> Transitions:
        """A batch, paid by the rewards of today where they are learnt: those in the replay are stale."""
        batch = drawn(self.replay, self.offline, self.batch_size, rng, self.policy.device)
        return batch if self.relabel is None else self.relabel(batch)

    @torch.no_grad()
    def target(self, batch: Transitions, noise: Tensor) -> Tensor:
        """y (N,)."""
        value = self.next_value(self.policy.encode(batch.next_obs), noise)
        return batch.reward + torch.where(batch.discount > 0, batch.discount * value, 0.0)

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
        told = {"critic/loss": loss.detach(), "critic/target_mean": mean(target, batch.weight)}
        return gradients, {} if encoder_trains else cond.data, told

    def counters(self) -> dict[str, float]:
        """For the log."""
        return {
            "optim/lr": self.optimizer.learning_rate(),
            "optim/steps": float(self.optimizer.steps),
            "optim/skipped_steps": float(sum(optimizer.skipped for optimizer in self.optimizers)),
            "replay/size": float(len(self.replay)),
        }

    # -- what an actor adds -----------------------------------------------------------------------

    @abstractmethod
    def noise(self, num: int) -> tuple[Tensor, Tree] | Tensor:
        """Of this update, for `num` rows: that of the target's actions, and that of the actor's."""

    @abstractmethod
    def next_value(self, cond: Cond, noise: Tensor) -> Tensor:
        """(N,) of the policy of today at `cond`, by the slow critics."""

    @abstractmethod
    def actor_gradients(
        self, rows: dict[str, Tree], cond: dict[str, Tensor], noise: Tree
    ) -> tuple[Sequence[Tensor], Any, dict[str, Tensor]]:
        """(by the policy's weights, what `after_actor` is told, numbers for the log); recorded."""

    @abstractmethod
    def after_actor(self, told: Any) -> None:
        """After each step of the policy."""

    def cloned(self) -> None:  # noqa: B027 - most keep nothing
        """After the policy was cloned from demonstrations."""

    @property
    def optimizers(self) -> list[Deferred]:
        """All that a step advances."""
        return [self.optimizer, self.twin.optimizer]

    def features(self, cond: dict[str, Tensor], obs: Tree) -> Cond:
        """The condition the critic's step left, or, of an encoder that trains, a new one with a graph."""
        return Cond(cond) if cond else self.policy.encode(obs)

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
            "replay": self.replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name, value in state["counters"].items():
            setattr(self, name, int(value))
        self.optimizer.load_state_dict(state["optimizer"])
        self.twin.load_state_dict(state["twin"])
        self.replay.load_state_dict(state["replay"], self.policy.device)


def mean(values: Tensor, weight: Tensor) -> Tensor:
    """Of values (N,) that count, by weight (N,)."""
    return weighted_sum(values, weight) / weight.sum().clamp(min=1e-12)


def means(history: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each number over the steps that have it, read from the device at once."""
    names = sorted({name for row in history for name in row})
    columns = [torch.stack([row[n] for row in history if n in row]).double().mean() for n in names]
    return dict(zip(names, torch.stack(columns).tolist(), strict=True)) if names else {}
