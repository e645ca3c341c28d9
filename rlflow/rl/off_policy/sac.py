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
from rlflow.rl.off_policy.actor import ActorCritic, ActorSettings, mean
from rlflow.rl.off_policy.learner import OffPolicySettings
from rlflow.rl.off_policy.path_entropy import entropy_target, path_log_prob
from rlflow.rl.off_policy.replay import Replay, Transitions
from rlflow.rl.off_policy.temperature import Temperature
from rlflow.rl.optim import Deferred
from rlflow.types import Cond, Tree


@dataclass(frozen=True)
class Acted:
    """What the policy did at N observations: actions (N, *D) after the squash, log p(path) (N,), noise std."""

    action: Tensor
    log_prob: Tensor
    std: Tensor


class SAC(ActorCritic):
    """With an entropy of the whole path, and a temperature that keeps it at its target."""

    def __init__(
        self,
        policy: FlowPolicy,
        steps: Steps,
        replay: Replay,
        settings: OffPolicySettings | None = None,
        actor: ActorSettings | None = None,
        *,
        alpha: float = 0.2,
        alpha_lr: float = 3e-4,
        target_entropy: float | None = None,
        anchor: float = 0.0,
        relabel: Callable[[Transitions], Transitions] | None = None,
    ):
        super().__init__(policy, steps, replay, settings, actor, relabel)
        if self.plan.scored.ndim > 1 or not bool(self.plan.scored.all()):
            raise ValueError("SAC differentiates through, and scores, every denoising step: use steps=all")
        self.anchor = anchor
        target = entropy_target(policy, target_entropy)
        self.temperature = Temperature(target, alpha, alpha_lr, policy.device)
        self.record([self.temperature.log])

    @property
    def optimizers(self) -> list[Deferred]:
        return [*super().optimizers, self.temperature.optimizer]

    def noise(self, num: int) -> Tensor:
        """Of this update, (2, K + 1, num, *D): for the target's actions and the actor's, each x_0's and the steps'."""
        rng = generator("sac/noise", self.settings.seed, self.updates, device=self.policy.device)
        shape = (2, self.plan.num_steps + 1, num, *self.policy.event_shape)
        return torch.randn(shape, generator=rng, dtype=self.policy.dtype, device=self.policy.device)

    def act(self, cond: Cond, noise: Tensor) -> Acted:
        """Sample at `cond` (N) with noise (K + 1, N, *D); gradients are the caller's choice."""
        chain = self.policy.sample(cond, self.plan, x_0=noise[0], step_noise=noise[1:])
        return Acted(self.policy.squash(chain.final), path_log_prob(self.policy, chain), chain.std)

    def next_value(self, cond: Cond, noise: Tensor) -> Tensor:
        acted = self.act(cond, noise)
        return self.twin.target_value(cond, acted.action) - self.temperature.value * acted.log_prob

    def actor_loss(self, cond: Cond, batch: Transitions, noise: Tensor) -> tuple[Tensor, Acted, Tensor]:
        """(loss, what was done, squared distance to the data's actions)."""
        acted = self.act(cond, noise)
        each = (acted.action - batch.action).square().flatten(2).mean(2)
        distance = torch.where(batch.counts > 0, each, 0.0).sum(1) / batch.counts.sum(1)
        per_row = self.temperature.value * acted.log_prob - self.twin.value(cond, acted.action)
        per_row = per_row + self.anchor * distance
        return mean(per_row, batch.weight), acted, distance

    def actor_gradients(
        self, rows: dict[str, Tree], cond: dict[str, Tensor], noise: Tensor
    ) -> tuple[Sequence[Tensor], Tensor, dict[str, Tensor]]:
        """(by the policy's weights, mean log p, numbers for the log); recorded. An encoder that trains runs here."""
        batch = Transitions(**rows)
        loss, acted, distance = self.actor_loss(self.features(cond, batch.obs), batch, noise)
        gradients = torch.autograd.grad(loss, self.optimizer.parameters, materialize_grads=True)  # none for the critics
        log_prob = mean(acted.log_prob.detach(), batch.weight)
        told = {
            "policy/loss": loss.detach(),
            "policy/entropy": -log_prob,
            "policy/anchor": mean(distance.detach(), batch.weight),
            "policy/std_mean": acted.std.detach().mean(),
        }
        return gradients, log_prob, told

    def after_actor(self, told: Tensor) -> None:
        self.temperature.fit(told)

    def counters(self) -> dict[str, float]:
        return super().counters() | {"policy/alpha": float(self.temperature.value)}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"temperature": self.temperature.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.temperature.load_state_dict(state["temperature"])
