"""OGPO: the chain learner paid by an off-policy critic (Patil et al. 2026, arXiv:2605.03065).

    critic   1/2 (Q_e(s, a) - y)^2,   y = R + discount Q'(s', a'),   a' ~ policy,   on the replay
    chain    states s of the replay, G chains of each from the policy of today, each paid Q(s, x_K): one step, the end

The second line is GRPO on images with a critic for a reward: group-relative advantages, a ratio for each denoising
step, clip. The environment is asked for new decisions alone; the chain is improved at states it has long left, as
often as one likes, and no gradient goes through it: neither the critic's by the action nor one through K steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlflow.flow.noise import Key, generator
from rlflow.flow.steps import Steps
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.rl.off_policy.learner import OffPolicy, OffPolicySettings
from rlflow.rl.off_policy.replay import Replay, Transitions
from rlflow.rl.optim import Deferred, Optimizer
from rlflow.types import Cond, Rollout, Tree, tree_map


@dataclass(frozen=True)
class Imagined:
    """How the chain is improved between two rollouts: from `states` of the replay, `copies` chains of each."""

    states: int = 64
    copies: int = 8
    rounds: int = 1  # updates of the chain an iteration, on states and chains of their own
    warmup: int = 0  # steps of the critics before the first
    conservative: bool = False  # pay what the critics agree on


class OGPO(OffPolicy):
    """`update(rollout)` stores it, fits the critics, then improves the chain by what they say.

    `chain` is a PolicyGradient with Groups(states, copies); `steps` the plan of its chains, and of the rollouts.
    """

    stream = "ogpo"

    def __init__(
        self,
        chain: PolicyGradient,
        steps: Steps,
        replay: Replay,
        settings: OffPolicySettings | None = None,
        imagined: Imagined | None = None,
    ):
        super().__init__(chain.policy, replay, settings)
        self.chain, self.steps, self.imagined = chain, steps, imagined or Imagined()
        groups = (chain.groups.num_groups, chain.groups.group_size)
        if groups != (self.imagined.states, self.imagined.copies):
            raise ValueError(f"the chain learner has groups of {groups}, {self.imagined} was asked for")
        chain.likelihood.check(self.policy, steps)

    @property
    def optimizer(self) -> Optimizer:
        """Of the chain."""
        return self.chain.optimizer

    @property
    def micro_batch(self) -> int:
        return max(super().micro_batch, self.chain.micro_batch)

    def cloned(self) -> None:
        for name in list(self.policy.weights.sets):
            self.policy.weights.snapshot(name)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Metrics; those of critics and chain are missing where no step was due yet."""
        due = self.store(rollout)
        self.policy.field.unguided.observe(rollout.flat(rollout.obs))
        losses = [self.step()["critic/loss"] for _ in range(due)]
        self.settle()
        metrics = {"replay/size": float(len(self.replay))}
        if losses:
            metrics["critic/loss"] = float(torch.stack(losses).mean())
        if losses and self.updates >= self.imagined.warmup:
            for round_ in range(self.imagined.rounds):
                metrics |= self.chain.update(self._paid(round_))
        self.iteration += 1
        return metrics

    # -- the critics ------------------------------------------------------------------------------

    @property
    def optimizers(self) -> list[Deferred]:
        return [self.twin.optimizer]

    def step(self) -> dict[str, Tensor]:
        """One of the critics."""
        batch = self.batch()
        with torch.no_grad():
            cond = self.policy.encode(batch.obs)
        loss = self.twin.loss(cond, batch.action, self.target(batch), batch.weight)
        self.twin.step(torch.autograd.grad(loss, self.twin.optimizer.parameters))
        self.updates += 1
        return {"critic/loss": loss.detach()}

    @torch.no_grad()
    def target(self, batch: Transitions) -> Tensor:
        """y (N,): what follows is valued by the action of a chain drawn from the policy of today."""
        cond, ids = self.policy.encode(batch.next_obs), torch.arange(len(batch))
        plan = self.steps(self.iteration, self.policy.grid(self.policy.num_steps), ids)
        key = Key(self.settings.seed, "ogpo/target", self.updates)
        chain = self.policy.sample(cond, plan, key=key, row_ids=ids)
        return batch.backed_up(self.twin.target_value(cond, self.policy.squash(chain.final)))

    # -- the chain --------------------------------------------------------------------------------

    def _paid(self, round_: int) -> Rollout:
        seed = self.settings.seed
        batch = self.draw(self.imagined.states, generator("ogpo/states", seed, self.iteration, round_))
        return self.imagine(batch.obs, batch.weight, Key(seed, "ogpo/chain", self.iteration, round_))

    @torch.no_grad()
    def imagine(self, obs: Tree, weight: Tensor, key: Key) -> Rollout:
        """A rollout (1, states * copies) of one step: `copies` chains at each of obs (S, ...), paid by the critics."""
        policy, likelihood, copies = self.policy, self.chain.likelihood, self.imagined.copies
        ids = torch.arange(len(weight) * copies)
        group = ids // copies
        plan = self.steps(self.iteration, policy.grid(policy.num_steps), ids)
        before, cond = policy.network_rows, policy.encode(obs)
        chain = policy.sample(cond, plan, key=key, row_ids=ids, copies=copies)
        cond = cond.repeat(copies)
        evidence = likelihood.record(policy, cond, chain, key, group if likelihood.shared_draws else ids)
        rows = group.to(policy.device)
        reward = self._pay(cond, policy.squash(chain.final)).unsqueeze(0)
        every = tree_map(lambda v: v[rows].unsqueeze(0), obs)
        over = torch.ones_like(reward, dtype=torch.bool)
        return Rollout(
            obs=every,
            action=chain.final.unsqueeze(0),
            reward=reward,
            terminated=over,
            truncated=~over,
            weight=weight[rows].to(reward).unsqueeze(0),
            last_obs=tree_map(lambda v: v[0], every),
            final_obs=None,
            group=rows,
            row_ids=ids.unsqueeze(0),
            evidence=evidence,
            cond=None if policy.encoder_trains else cond,
            network_calls=policy.network_rows - before,
        )

    def _pay(self, cond: Cond, action: Tensor) -> Tensor:
        """(S * copies,) of the critics for copies that stand together."""
        if not self.imagined.conservative:
            return self.twin.value(cond, action)
        each = self.twin.each(cond, action)
        by_state = each.unflatten(1, (-1, self.imagined.copies))
        return agreed((by_state - by_state.mean(-1, keepdim=True)).flatten(1))

    # -- state ------------------------------------------------------------------------------------

    def set_progress(self, progress: float) -> None:
        self.chain.set_progress(progress)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"chain": self.chain.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.chain.load_state_dict(state["chain"])


def agreed(advantages: Tensor) -> Tensor:
    """(N,) the advantage nearest 0 where all E of (E, N) have one sign, else 0 (the paper's conservative one)."""
    least, most = advantages.amin(0), advantages.amax(0)
    return least.clamp(min=0) + most.clamp(max=0)
