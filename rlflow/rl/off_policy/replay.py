"""Replay: a ring of the last steps of B environment rows, on the policy's device, with raw observations.

An entry is one decision: (obs, action, R = sum_{i < h} gamma^i r_i, gamma^h (1 - terminated), observation truly
reached), h <= H primitive steps of a chunk. What a time limit ended is bootstrapped from what was reached.

Targets look one decision ahead. A sum over n of them owes the entropy of those between, alpha log p of whole paths
under the policy of today; the replay keeps actions, not paths, and without it a third of the bonus is lost at n = 3.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlflow.types import Rollout, Tree, tree_cat, tree_leaves, tree_map


@dataclass(frozen=True)
class Transitions:
    """N decisions with their outcome, ready to learn from."""

    obs: Tree  # (N, ...) raw
    action: Tensor  # (N, *D) as the environment took it
    reward: Tensor  # (N,) discounted inside
    discount: Tensor  # (N,) of the value of next_obs; 0 after a terminal step
    next_obs: Tree  # (N, ...) truly reached
    weight: Tensor  # (N,) 0 masks
    counts: Tensor  # (N, H) 1 for each action of the chunk that says what to do, 0 behind a demonstration's end

    def index(self, rows: Tensor) -> Transitions:
        """Those of `rows` (M,)."""
        return Transitions(**{f.name: tree_map(lambda v: v[rows], getattr(self, f.name)) for f in fields(self)})

    def paid_as(self, other: Transitions) -> Transitions:
        """The same decisions with the outcomes of `other` (N): reward, discount, weight."""
        return replace(self, reward=other.reward, discount=other.discount, weight=other.weight)

    def backed_up(self, value: Tensor) -> Tensor:
        """y (N,) = R + discount V, with `value` (N,) of what was reached, which need not be a number after an end."""
        return self.reward + torch.where(self.discount > 0, self.discount * value, 0.0)

    def to(self, device: torch.device) -> Transitions:
        """On another device."""
        return Transitions(**{f.name: tree_map(lambda v: v.to(device), getattr(self, f.name)) for f in fields(self)})

    def __len__(self) -> int:
        return len(self.reward)

    @staticmethod
    def cat(a: Transitions, b: Transitions) -> Transitions:
        """One behind the other."""
        return Transitions(**{f.name: tree_cat([getattr(a, f.name), getattr(b, f.name)]) for f in fields(a)})


def next_observations(rollout: Rollout) -> Tree:
    """Observations truly reached (T, B, ...); after a terminal step, where nobody asks, those of the next episode."""
    if rollout.final_obs is not None:
        return rollout.final_obs
    return tree_map_pair(rollout.obs, rollout.last_obs)


def tree_map_pair(obs: Tree, last: Tree) -> Tree:
    """(T, B, ...) moved on by one step, `last` (B, ...) behind."""
    return tree_cat([tree_map(lambda v: v[1:], obs), tree_map(lambda v: v.unsqueeze(0), last)])


class Replay:
    """At most `capacity` decisions; the oldest are overwritten. `draw` and `at` never wait for the device."""

    def __init__(self, capacity: int, gamma: float):
        if capacity < 1 or not 0 <= gamma <= 1:
            raise ValueError(f"need capacity >= 1 and gamma in [0, 1], got {capacity} and {gamma}")
        self.capacity, self.gamma = capacity, gamma
        self.data: dict[str, Tree] = {}
        self.slots, self.filled, self.head = 0, 0, 0

    def __len__(self) -> int:
        return self.filled * self.num_rows

    @property
    def num_rows(self) -> int:
        """B; 0 before the first step."""
        return self.data["reward"].shape[1] if self.data else 0

    def add(self, rollout: Rollout, action: Tensor) -> None:
        """Store T steps of B rows; `action` (T, B, *D) is what the environment took."""
        reward = rollout.reward
        steps = torch.ones_like(reward) if rollout.num_steps is None else rollout.num_steps.to(reward)
        entry = {
            "obs": rollout.obs,
            "action": action,
            "reward": torch.where(rollout.weight > 0, reward, 0.0),
            "discount": torch.where(rollout.terminated, 0.0, self.gamma**steps),
            "next_obs": next_observations(rollout),
            "weight": rollout.weight,
        }
        self._make_room(entry)
        where = (self.head + torch.arange(len(reward))) % self.slots
        for name, value in entry.items():
            _write(self.data[name], where, value)
        self.head = (self.head + len(reward)) % self.slots
        self.filled = min(self.slots, self.filled + len(reward))

    def _make_room(self, entry: dict[str, Tree]) -> None:
        num_steps, num_rows = entry["reward"].shape
        if not self.data:
            self.slots = self.capacity // num_rows
            if self.slots < num_steps:
                raise ValueError(
                    f"capacity={self.capacity} holds {self.slots} steps of {num_rows} rows, an iteration has "
                    f"{num_steps}: raise algorithm.capacity or lower env.horizon"
                )
            self.data = {n: tree_map(lambda v: v.new_zeros(self.slots, *v.shape[1:]), v) for n, v in entry.items()}
        if num_rows != self.num_rows:
            raise ValueError(f"the replay holds steps of {self.num_rows} rows, got {num_rows}")

    def draw(self, num: int, rng: torch.Generator) -> Tensor:
        """Entry numbers (num,), each stored one equally likely, drawn on the CPU."""
        if not self.filled:
            raise ValueError("nothing to draw from: the replay is empty")
        return torch.randint(len(self), (num,), generator=rng)

    def at(self, index: Tensor) -> Transitions:
        """The decisions `index` (N,)."""
        found: dict[str, Any] = {
            name: tree_map(lambda v: v.flatten(0, 1).index_select(0, index), tree) for name, tree in self.data.items()
        }
        return Transitions(**found, counts=torch.ones_like(found["action"].flatten(2)[..., 0]))

    def state_dict(self) -> dict[str, Any]:
        """What is filled, and where the ring stands."""
        data = tree_map(lambda v: v[: self.filled], self.data) if self.data else {}
        return {"data": data, "slots": self.slots, "filled": self.filled, "head": self.head}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Inverse of `state_dict`."""
        self.slots, self.filled, self.head = (int(state[name]) for name in ("slots", "filled", "head"))
        self.data = {}
        for name, value in state["data"].items():
            self.data[name] = tree_map(lambda v: v.new_zeros(self.slots, *v.shape[1:], device=device), value)
            _write(self.data[name], torch.arange(self.filled), value)


def _write(stored: Tree, where: Tensor, value: Tree) -> None:
    """stored[where] = value, leaf by leaf, in place."""
    for mine, new in zip(tree_leaves(stored), tree_leaves(value), strict=True):
        mine[where.to(mine.device)] = new.to(mine)
