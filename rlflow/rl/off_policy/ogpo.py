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
from rlflow.parallel import dist
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.rl.off_policy.offline import Offline, clone, drawn, paid_at_random
from rlflow.rl.off_policy.replay import Replay, Transitions
from rlflow.rl.off_policy.twin import Twin, TwinSettings
from rlflow.rl.optim import Optimizer
from rlflow.types import Cond, Rollout, Tree, tree_map


@dataclass(frozen=True)
class Imagined:
    """How the chain is improved between two rollouts: from `states` of the replay, `copies` chains of each."""

    states: int = 64
    copies: int = 8
    rounds: int = 1  # updates of the chain an iteration, on states and chains of their own
    warmup: int = 0  # steps of the critics before the first
    conservative: bool = False  # pay what the critics agree on


class OGPO:
    """`update(rollout)` stores it, fits the critics, then improves the chain by what they say.

    `chain` is a PolicyGradient with Groups(states, copies); `steps` the plan of its chains, and of the rollouts.
    """

    sample_with = "live"
    keep_path = 0

    def __init__(
        self,
        chain: PolicyGradient,
        steps: Steps,
        replay: Replay,
        *,
        imagined: Imagined | None = None,
        twin: TwinSettings | None = None,
        batch_size: int = 256,
        start: int = 1000,
        updates_per_step: float = 1.0,
        offline: Offline | None = None,
        seed: int = 0,
        permute: bool = False,
    ):
        if dist.world() > 1:
            raise ValueError("OGPO keeps one replay in one process: start it with --processes 1")
        if offline is not None:
            offline.check(chain.policy)
        self.chain, self.policy, self.steps, self.replay = chain, chain.policy, steps, replay
        self.imagined, self.batch_size, self.start = imagined or Imagined(), batch_size, start
        groups = (chain.groups.num_groups, chain.groups.group_size)
        if groups != (self.imagined.states, self.imagined.copies):
            raise ValueError(f"the chain learner has groups of {groups}, {self.imagined} was asked for")
        chain.likelihood.check(self.policy, steps)
        self.offline = offline
        self.updates_per_step, self.seed, self.permute = updates_per_step, seed, permute
        num_inputs = self.policy.field.num_features + torch.Size(self.policy.event_shape).numel()
        self.twin = Twin(num_inputs, twin or TwinSettings(), self.policy.device, self.policy.dtype)
        self.iteration, self.seen, self.updates = 0, 0, 0

    @property
    def optimizer(self) -> Optimizer:
        """Of the chain."""
        return self.chain.optimizer

    @property
    def micro_batch(self) -> int:
        """Rows of one network pass."""
        return max(self.batch_size, self.chain.micro_batch)

    def begin(self) -> None:
        """Clone the demonstrations, then fit the critics to them alone; without any, nothing."""
        if self.offline is None:
            return
        clone(self.policy, self.offline, self.batch_size, self.seed)
        for name in list(self.policy.weights.sets):
            self.policy.weights.snapshot(name)
        for _ in range(self.offline.updates):
            self._fit()
        self.twin.optimizer.settle()

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Metrics; those of critics and chain are missing where no step was due yet."""
        self.replay.add(rollout, self.policy.squash(rollout.action))
        self.seen += rollout.num_rows
        self.policy.field.unguided.observe(rollout.flat(rollout.obs))
        first = 0 if self.offline is None else self.offline.updates
        due = max(0, int(self.updates_per_step * (self.seen - self.start)) - self.updates + first)
        losses = [self._fit() for _ in range(due)]
        self.twin.optimizer.settle()
        metrics = {"replay/size": float(len(self.replay))}
        if losses:
            metrics["critic/loss"] = float(torch.stack(losses).mean())
        if losses and self.updates >= self.imagined.warmup:
            for round_ in range(self.imagined.rounds):
                metrics |= self.chain.update(self._paid(round_))
        self.iteration += 1
        return metrics

    # -- the critic -------------------------------------------------------------------------------

    def _fit(self) -> Tensor:
        self.twin.redraw(generator("ogpo/critics", self.seed, self.updates))
        rng = generator("ogpo/replay", self.seed, self.updates)
        batch = self._draw(self.batch_size, rng)
        if self.permute:
            batch = paid_at_random(batch, self._draw(self.batch_size, rng), self.offline is not None, rng)
        with torch.no_grad():
            cond = self.policy.encode(batch.obs)
        loss = self.twin.loss(cond, batch.action, self.target(batch), batch.weight)
        self.twin.step(torch.autograd.grad(loss, self.twin.optimizer.parameters))
        self.updates += 1
        return loss.detach()

    def _draw(self, num: int, rng: torch.Generator) -> Transitions:
        return drawn(self.replay, self.offline, num, rng, self.policy.device)

    @torch.no_grad()
    def target(self, batch: Transitions) -> Tensor:
        """y (N,): what follows is valued by the action of a chain drawn from the policy of today."""
        cond, ids = self.policy.encode(batch.next_obs), torch.arange(len(batch))
        plan = self.steps(self.iteration, self.policy.grid(self.policy.num_steps), ids)
        chain = self.policy.sample(cond, plan, key=Key(self.seed, "ogpo/target", self.updates), row_ids=ids)
        value = self.twin.target_value(cond, self.policy.squash(chain.final))
        return batch.reward + torch.where(batch.discount > 0, batch.discount * value, 0.0)

    # -- the chain --------------------------------------------------------------------------------

    def _paid(self, round_: int) -> Rollout:
        batch = self._draw(self.imagined.states, generator("ogpo/states", self.seed, self.iteration, round_))
        return self.imagine(batch.obs, batch.weight, Key(self.seed, "ogpo/chain", self.iteration, round_))

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
        """Share of the run that is done, for schedules."""
        self.chain.set_progress(progress)

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs besides the policy and its weight sets; the replay with it."""
        return {
            "counters": {"iteration": self.iteration, "seen": self.seen, "updates": self.updates},
            "chain": self.chain.state_dict(),
            "twin": self.twin.state_dict(),
            "replay": self.replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name, value in state["counters"].items():
            setattr(self, name, int(value))
        self.chain.load_state_dict(state["chain"])
        self.twin.load_state_dict(state["twin"])
        self.replay.load_state_dict(state["replay"], self.policy.device)


def agreed(advantages: Tensor) -> Tensor:
    """(N,) the advantage nearest 0 where all E of (E, N) have one sign, else 0 (the paper's conservative one)."""
    least, most = advantages.amin(0), advantages.amax(0)
    return least.clamp(min=0) + most.clamp(max=0)
