"""The part of off-policy learning that actors share whose gradient comes from the critics: two recorded functions.

A step is the critics', then the actor's by the critics of now; the deployed weights are an average of the actor's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import Steps
from rlflow.rl.masked import weighted_sum
from rlflow.rl.off_policy.learner import OffPolicy, OffPolicySettings
from rlflow.rl.off_policy.replay import Replay, Transitions
from rlflow.rl.optim import AdamW, Deferred
from rlflow.rl.recorded import Recorded
from rlflow.types import Cond, Rollout, Tree


@dataclass(frozen=True)
class ActorSettings:
    """How the policy's weights move."""

    optimizer: AdamW = field(default_factory=lambda: AdamW(lr=3e-4, betas=(0.9, 0.999), max_grad_norm=0.0))
    every: int = 1  # optimiser steps of the critics per one of the actor
    ema_decay: float = 0.9  # an iteration, of the deployed average


class ActorCritic(OffPolicy):
    """`step` moves critics and actor; what the actor climbs is a subclass's."""

    stream = "sac"

    def __init__(
        self,
        policy: FlowPolicy,
        steps: Steps,
        replay: Replay,
        settings: OffPolicySettings | None = None,
        actor: ActorSettings | None = None,
        relabel: Callable[[Transitions], Transitions] | None = None,
    ):
        super().__init__(policy, replay, settings, relabel)
        self.plan = steps(0, policy.grid(policy.num_steps), torch.zeros(1, dtype=torch.long))
        self.actor = actor or ActorSettings()
        trained = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = Deferred(trained, self.actor.optimizer, "algorithm.lr")
        policy.weights.snapshot("ema")

    def record(self, moving: Sequence[Tensor] = ()) -> None:
        """Last in a constructor: `moving` is what a step changes besides the policy and the critics."""
        every = [*self.optimizer.parameters, *self.twin.moving, *moving]
        self._critic, self._actor = (
            Recorded(fn, self.policy, every) for fn in (self.critic_gradients, self.actor_gradients)
        )

    # -- one iteration ----------------------------------------------------------------------------

    def begin(self) -> None:
        super().begin()
        if self.settings.offline is not None:
            self.policy.weights.snapshot("ema")

    def cloned(self) -> None:
        self._renew()

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Store a rollout and learn; returns metrics, nan where no step was due yet."""
        due = self.store(rollout)
        self._renew()
        history = [self.step() for _ in range(due)]
        self.settle()
        self.policy.field.unguided.observe(rollout.flat(rollout.obs))
        self.policy.weights.blend("ema", self.actor.ema_decay)
        self.iteration += 1
        return means(history) | self.counters()

    def _renew(self) -> None:
        for recorded in (self._critic, self._actor):
            recorded.renew()

    def step(self) -> dict[str, Tensor]:
        """One of the optimisers, whether due or not; its numbers, on the device."""
        batch, (target, actor) = self.batch(), self.noise(self.settings.batch_size)
        rows = vars(batch)
        gradients, cond, out = self._critic(rows, target)
        self.twin.step(gradients)
        if self.updates % self.actor.every == 0:
            out |= self._actor_step(rows, cond, actor)
        self.updates += 1
        return out

    def _actor_step(self, rows: dict[str, Tree], cond: dict[str, Tensor], noise: Any) -> dict[str, Tensor]:
        gradients, told, out = self._actor(rows, cond, noise)
        norm = self.optimizer.advance(gradients)
        self.after_actor(told)
        return out | {"optim/grad_norm": norm}

    @torch.no_grad()
    def target(self, batch: Transitions, noise: Tensor) -> Tensor:
        """y (N,)."""
        return batch.backed_up(self.next_value(self.policy.encode(batch.next_obs), noise))

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

    @property
    def optimizers(self) -> list[Deferred]:
        return [self.optimizer, self.twin.optimizer]

    def features(self, cond: dict[str, Tensor], obs: Tree) -> Cond:
        """The condition the critic's step left, or, of an encoder that trains, a new one with a graph."""
        return Cond(cond) if cond else self.policy.encode(obs)

    # -- state ------------------------------------------------------------------------------------

    def set_progress(self, progress: float) -> None:
        self.optimizer.progress = progress
        self.policy.kernel.set_progress(progress)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])


def mean(values: Tensor, weight: Tensor) -> Tensor:
    """Of values (N,) that count, by weight (N,)."""
    return weighted_sum(values, weight) / weight.sum().clamp(min=1e-12)


def means(history: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each number over the steps that have it, read from the device at once."""
    names = sorted({name for row in history for name in row})
    columns = [torch.stack([row[n] for row in history if n in row]).double().mean() for n in names]
    return dict(zip(names, torch.stack(columns).tolist(), strict=True)) if names else {}
