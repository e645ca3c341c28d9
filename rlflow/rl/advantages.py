"""Advantages: group-relative (GRPO) and generalised advantage estimation (PPO).

All moments are weighted, and summed over every rank before they are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlflow.parallel import dist
from rlflow.ranges import Limit, NotNegative, Unit
from rlflow.rl.groups import Groups
from rlflow.rl.masked import weighted_sum
from rlflow.types import Rollout


@dataclass(frozen=True)
class Advantages:
    """advantage (T, B), or (T, B, R) with one for each column of the evidence, returns (T, B) for a critic.

    weight (T, B) is 0 where nothing can be learnt.
    """

    advantage: Tensor
    weight: Tensor
    returns: Tensor | None = None


class Advantage:
    """Base of all advantages; a call gives those of a rollout, with the critic's values where it needs a critic."""

    needs_critic: ClassVar[bool] = False

    def check(self, groups: Groups) -> None:
        """ValueError where such groups have no advantage."""

    def __call__(self, rollout: Rollout, values: Tensor | None, next_values: Tensor | None) -> Advantages:
        """values, next_values (T, B) from the critic, if any; next_values are of the states truly reached."""
        raise NotImplementedError


def moments(value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean, biased std and count over all ranks (two passes, float64)."""
    value, weight = value.double(), weight.double()
    first = dist.all_sum(torch.stack([weighted_sum(value, weight), weight.sum()]))
    count = first[1].clamp(min=1e-300)
    mean = first[0] / count
    var = dist.all_sum(weighted_sum((value - mean).square(), weight)) / count
    return mean, var.sqrt(), first[1]


def normalize(value: Tensor, weight: Tensor, eps: float = 1e-8) -> Tensor:
    """(value - mean) / (std + eps) with moments over all ranks."""
    mean, std, _ = moments(value, weight)
    return ((value.double() - mean) / (std + eps)).to(value.dtype)


def group_moments(value: Tensor, weight: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean, biased variance and count of each row's group, as (B,) in float64.

    Group ids stay integers: a float32 id is exact only up to 2^24.
    """
    ids, index = torch.unique(group, return_inverse=True)
    value, weight = torch.where(weight > 0, value, 0.0).double(), weight.double()

    def per_group(x: Tensor) -> Tensor:
        return torch.zeros(len(ids), dtype=x.dtype, device=x.device).index_add_(0, index, x)[index]

    count = per_group(weight).clamp(min=1e-300)
    mean = per_group(value * weight) / count
    var = per_group((value - mean).square() * weight) / count
    return mean, var, count


@dataclass(frozen=True)
class GroupAdvantage(Advantage):
    """A = (r - group mean) / (std + eps), the same for every denoising step (Flow-GRPO, DanceGRPO, MixGRPO).

    `std` is the biased one of the group, or of all raw rewards of the iteration ('epoch'), or none.
    Groups whose rewards do not differ get weight 0: shapes never change. With rewards combined at
    advantage level, each reward is normalised alone and the results are averaged with |weights|.
    """

    std: Literal["group", "epoch", "none"] = "group"
    eps: NotNegative = 1e-4
    unbiased: bool = False
    clip: Limit = 5.0

    def check(self, groups: Groups) -> None:
        """ValueError for groups of one."""
        if groups.group_size < 2:
            raise ValueError(
                "a group of 1 has no group advantage: set group_size >= 2, or use advantage=gae (a critic)"
            )

    def __call__(self, rollout: Rollout, values: Tensor | None, next_values: Tensor | None) -> Advantages:
        """From the undiscounted return of each row (B,), spread over its T steps."""
        alive = self._alive(rollout)
        if rollout.reward_weights:
            scale = sum(abs(w) for w in rollout.reward_weights.values())
            parts = [
                (w / scale, self._returns(rollout, rollout.reward_parts[n]))
                for n, w in rollout.reward_weights.items()
                if w
            ]
        else:
            parts = [(1.0, self._returns(rollout, rollout.reward))]
        advantage, spread = torch.zeros_like(alive), torch.zeros_like(alive, dtype=torch.bool)
        for weight, returns in parts:
            a, differs = self._one(returns, alive, rollout.group)
            advantage, spread = advantage + weight * a, spread | differs
        advantage = advantage.clamp(-self.clip, self.clip)
        return Advantages(advantage.expand_as(rollout.reward), rollout.weight * (alive * spread))

    @staticmethod
    def _alive(rollout: Rollout) -> Tensor:
        """(B,) the first step's weight; 0 where a reward before the row's end is missing: its return is unknown."""
        ends = (rollout.terminated | rollout.truncated).long()
        ended = ends.cumsum(0) > ends  # at an earlier step
        missing = ((rollout.weight == 0) & ~ended).any(0)
        return torch.where(missing, 0.0, rollout.weight[0])

    @staticmethod
    def _returns(rollout: Rollout, reward: Tensor) -> Tensor:
        return torch.where(rollout.weight > 0, reward, 0.0).sum(0)

    def _one(self, returns: Tensor, alive: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        mean, var, count = group_moments(returns, alive, group)
        differs = (count > 1) & (var.sqrt() > 1e-6 * (1 + mean.abs()))
        std, num = var.sqrt(), count
        if self.std == "epoch":
            _, std, num = moments(returns, alive)
        if self.unbiased:
            std = std * (num / (num - 1).clamp(min=1)).sqrt()
        scale = 1.0 if self.std == "none" else std + self.eps
        a = torch.where(alive > 0, (returns - mean) / scale, 0.0)
        return torch.where(differs, a, 0.0).to(returns.dtype), differs


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float | Tensor,
    lam: float,
) -> Tensor:
    """Generalised advantage estimates (T, B) (Schulman et al. 2016).

    delta = r + gamma (1 - terminated) V' - V,  A = delta + gamma lam (1 - terminated)(1 - truncated) A';
    V' is the value of the state truly reached, also where the episode was cut off. `gamma` may be (T, B):
    gamma^h for an action that took h primitive steps, whose rewards r has discounted among themselves.
    """
    delta = reward + gamma * next_value * ~terminated - value
    keep = gamma * lam * (~(terminated | truncated)).to(delta.dtype)
    advantage, running = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        running = delta[t] + keep[t] * running
        advantage[t] = running
    return advantage


@dataclass(frozen=True)
class GAE(Advantage):
    """GAE with a critic, normalised over all ranks; a step without a reward is cut out, as if episodes ended at it.

    `gamma` discounts per primitive step: by gamma^h over an action of h of them.
    """

    gamma: float = 0.99
    lam: Unit = 0.95
    normalize: bool = True
    needs_critic: ClassVar[bool] = True

    def __call__(self, rollout: Rollout, values: Tensor | None, next_values: Tensor | None) -> Advantages:
        """values, next_values (T, B) from the critic; next_values are of the states truly reached."""
        assert values is not None
        assert next_values is not None
        masked = rollout.weight == 0
        reward = torch.where(masked, 0.0, rollout.reward)
        cut = rollout.truncated | torch.cat([masked[1:], torch.zeros_like(masked[:1])])  # the next step is unknown
        gamma = self.gamma if rollout.num_steps is None else self.gamma ** rollout.num_steps.to(reward.dtype)
        a = gae(reward, values, next_values, rollout.terminated, cut, gamma, self.lam)
        returns = a + values
        return Advantages(normalize(a, rollout.weight) if self.normalize else a, rollout.weight, returns)
