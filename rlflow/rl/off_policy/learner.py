"""What every off-policy learner shares: replay, critics, demonstrations, and when a step is due."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlflow.flow.noise import generator
from rlflow.flow.policy import FlowPolicy
from rlflow.parallel import dist
from rlflow.rl.off_policy.offline import Offline, clone, drawn, paid_at_random
from rlflow.rl.off_policy.replay import Replay, Transitions
from rlflow.rl.off_policy.twin import Twin, TwinSettings
from rlflow.rl.optim import Deferred
from rlflow.types import Rollout


@dataclass(frozen=True)
class OffPolicySettings:
    """By what critics, on how many decisions a step is made, and when one is due.

    `permute` makes the control: a decision drawn from the replay is paid what another, drawn apart, was. Shuffled
    inside their rollout alone, rewards still rise with the policy that earned them, and the replay learns from that.
    """

    batch_size: int = 256
    start: int = 5000  # decisions seen before the first step
    updates_per_step: float = 1.0  # steps of the critics per decision after that
    twin: TwinSettings = field(default_factory=TwinSettings)
    offline: Offline | None = None
    seed: int = 0
    permute: bool = False


class OffPolicy(ABC):
    """`update(rollout)` stores the rollout and makes the optimiser steps that are due.

    `relabel` pays a batch anew, by rewards that are learnt: those in the replay are stale.
    """

    sample_with = "live"
    keep_path = 0
    stream: str
    """Names its random draws."""

    def __init__(
        self,
        policy: FlowPolicy,
        replay: Replay,
        settings: OffPolicySettings | None = None,
        relabel: Callable[[Transitions], Transitions] | None = None,
    ):
        if dist.world() > 1:
            raise ValueError(f"{type(self).__name__} keeps one replay in one process: start it with --processes 1")
        c = self.settings = settings or OffPolicySettings()
        if c.offline is not None:
            c.offline.check(policy)
        self.policy, self.replay, self.relabel = policy, replay, relabel
        num_inputs = policy.field.num_features + torch.Size(policy.event_shape).numel()
        self.twin = Twin(num_inputs, c.twin, policy.device, policy.dtype, policy.autocast)
        self.iteration, self.seen, self.updates = 0, 0, 0

    # -- one iteration ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Clone the demonstrations, then learn from them alone; without any, nothing."""
        c = self.settings
        if c.offline is None:
            return
        clone(self.policy, c.offline, c.batch_size, c.seed)
        self.cloned()
        for _ in range(c.offline.updates):
            self.step()
        self.settle()

    @abstractmethod
    def cloned(self) -> None:
        """After the policy was cloned from demonstrations."""

    @abstractmethod
    def update(self, rollout: Rollout) -> dict[str, float]:
        """Store a rollout and learn; returns metrics."""

    def store(self, rollout: Rollout) -> int:
        """Keep it; the optimiser steps that are due then."""
        self.replay.add(rollout, self.policy.squash(rollout.action))
        due = self.due(rollout.num_rows)
        self.seen += rollout.num_rows
        return due

    def due(self, rows: int) -> int:
        """Optimiser steps after `rows` more decisions: those beyond the first `start` call for them."""
        c = self.settings
        first = 0 if c.offline is None else c.offline.updates
        return max(0, int(c.updates_per_step * (self.seen + rows - c.start)) - self.updates + first)

    @abstractmethod
    def step(self) -> dict[str, Tensor]:
        """One of the optimisers, whether due or not; its numbers, on the device."""

    @property
    @abstractmethod
    def optimizers(self) -> list[Deferred]:
        """All that a step advances."""

    def settle(self) -> None:
        """Look whether their steps were finite."""
        for optimizer in self.optimizers:
            optimizer.settle()

    @property
    def micro_batch(self) -> int:
        """Rows of one network pass."""
        return self.settings.batch_size

    def batch(self) -> Transitions:
        """Of this step, whose critics are drawn with it."""
        c = self.settings
        self.twin.redraw(generator(f"{self.stream}/critics", c.seed, self.updates))
        rng = generator(f"{self.stream}/replay", c.seed, self.updates)
        batch = self.draw(c.batch_size, rng)
        if not c.permute:
            return batch
        return paid_at_random(batch, self.draw(c.batch_size, rng), c.offline is not None, rng)

    def draw(self, num: int, rng: torch.Generator) -> Transitions:
        """`num` decisions of replay and demonstrations."""
        batch = drawn(self.replay, self.settings.offline, num, rng, self.policy.device)
        return batch if self.relabel is None else self.relabel(batch)

    # -- state ------------------------------------------------------------------------------------

    @abstractmethod
    def set_progress(self, progress: float) -> None:
        """Share of the run that is done, for schedules."""

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs besides the policy and its weight sets; the replay with it."""
        return {
            "counters": {"iteration": self.iteration, "seen": self.seen, "updates": self.updates},
            "twin": self.twin.state_dict(),
            "replay": self.replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name, value in state["counters"].items():
            setattr(self, name, int(value))
        self.twin.load_state_dict(state["twin"])
        self.replay.load_state_dict(state["replay"], self.policy.device)
