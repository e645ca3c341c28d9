"""FlowQ: an off-policy critic, a flow cloned from whatever the batches hold, and a policy extracted from the two.

    critic      1/2 (Q_e(s, a) - y)^2,   y = R + discount Q'(s', a'),   a' of the deployed policy
    behaviour   |v_b(x_t, t) - (x_1 - x_0)|^2 at x_1 = squash^-1(a_data)
    policy      extraction.py: FQL, or QAM

There is no entropy and no temperature: what keeps the policy wide is the cloned flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlflow.flow.matching import cfm_loss
from rlflow.flow.noise import generator
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import Steps
from rlflow.rl.off_policy.actor import ActorCritic, ActorSettings, mean
from rlflow.rl.off_policy.extraction import Extraction
from rlflow.rl.off_policy.learner import OffPolicySettings
from rlflow.rl.off_policy.replay import Replay, Transitions
from rlflow.rl.optim import Deferred
from rlflow.types import Cond, Tree


class FlowQ(ActorCritic):
    """The behaviour flow has the policy's shape and reads its features; it begins as its clone."""

    def __init__(
        self,
        policy: FlowPolicy,
        steps: Steps,
        replay: Replay,
        extraction: Extraction,
        settings: OffPolicySettings | None = None,
        actor: ActorSettings | None = None,
    ):
        super().__init__(policy, steps, replay, settings, actor)
        if policy.encoder_trains:
            raise ValueError("flow_q has two flows that read one encoder: freeze it by policy.frozen")
        extraction.check(policy, steps)
        self.extraction, self.behaviour = extraction, extraction.behaviour(policy)
        cloned = [p for p in self.behaviour.field.parameters() if p.requires_grad]
        self.cloning = Deferred(cloned, self.actor.optimizer, "algorithm.lr")
        self.plans, self.deployed = (self.plan, self.behaviour.plan()), policy.plan()
        self.record(cloned)

    def cloned(self) -> None:
        self.behaviour.load_state_dict(self.policy.state_dict())
        super().cloned()

    @property
    def optimizers(self) -> list[Deferred]:
        return [*super().optimizers, self.cloning]

    def noise(self, num: int) -> tuple[Tensor, dict[str, Tensor]]:
        device, dtype = self.policy.device, self.policy.dtype
        rng = generator("flow_q/noise", self.settings.seed, self.updates, device=device)
        shape = (self.plan.num_steps + 3, num, *self.policy.event_shape)
        target, x_0, *chain = torch.randn(shape, generator=rng, dtype=dtype, device=device)
        t = torch.rand(num, generator=rng, dtype=dtype, device=device)
        return target, {"chain": torch.stack(chain), "x_0": x_0, "t": t}

    def next_value(self, cond: Cond, noise: Tensor) -> Tensor:
        chain = self.policy.sample(cond, self.deployed, x_0=noise)
        return self.twin.target_value(cond, self.policy.squash(chain.final))

    def actor_gradients(
        self, rows: dict[str, Tree], cond: dict[str, Tensor], noise: Any
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], dict[str, Tensor]]:
        """(by the policy's weights, by the behaviour's, numbers for the log); recorded."""
        batch, at, before = Transitions(**rows), Cond(cond), self.behaviour.counts
        matched = self.matched(batch, at, noise)
        losses, told = self.extraction.loss(
            self.policy, self.behaviour, self.plans, at, lambda action: self.twin.value(at, action), noise["chain"]
        )
        loss = mean(losses, batch.weight)
        gradients = torch.autograd.grad(loss, self.optimizer.parameters, materialize_grads=True)
        to_behaviour = torch.autograd.grad(matched, self.cloning.parameters, materialize_grads=True)
        self.policy.count([b - a for a, b in zip(before, self.behaviour.counts, strict=True)])
        return gradients, to_behaviour, {"policy/loss": loss.detach(), "policy/cloning": matched.detach()} | told

    def matched(self, batch: Transitions, cond: Cond, noise: dict[str, Tensor]) -> Tensor:
        """Flow matching () of the behaviour to decisions that were carried out whole."""
        whole = batch.weight * (batch.counts > 0).all(1)
        x_1 = self.policy.squash.inverse(batch.action)
        return mean(cfm_loss(self.behaviour.field.unguided, x_1, cond, noise["x_0"], noise["t"]), whole)

    def after_actor(self, told: Sequence[Tensor]) -> None:
        self.cloning.advance(told)

    def state_dict(self) -> dict[str, Any]:
        kept = {"behaviour": self.behaviour.state_dict(), "cloning": self.cloning.state_dict()}
        return super().state_dict() | kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.behaviour.load_state_dict(state["behaviour"])
        self.cloning.load_state_dict(state["cloning"])
