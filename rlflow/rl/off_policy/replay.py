"""Replay: a ring of the last steps of B environment rows, on the policy's device, with raw observations.

An entry is one decision: (obs, action, R = sum_{i < h} gamma^i r_i, gamma^h, observation truly reached, terminated),
h <= H primitive steps of a chunk. A draw looks n decisions ahead,

    R_n = R_0 + gamma^{h_0} R_1 + ...,    discount = gamma^{h_0 + ... + h_{m-1}} (1 - terminated),    m <= n,

ending early where an episode ends (a truncated one is bootstrapped from what it reached), or where the next entry
does not begin with what this one reached: at the newest entry, after a resume, between episodes begun anew.
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

    def to(self, device: torch.device) -> Transitions:
        """On another device."""
        return Transitions(**{f.name: tree_map(lambda v: v.to(device), getattr(self, f.name)) for f in fields(self)})

    def __len__(self) -> int:
        return len(self.reward)

    @staticmethod
    def cat(a: Transitions, b: Transitions) -> Transitions:
        """One behind the other."""
        return Transitions(**{f.name: tree_cat([getattr(a, f.name), getattr(b, f.name)]) for f in fields(a)})


def same_rows(a: Tree, b: Tree, batch_dims: int) -> Tensor:
    """True where all numbers of a row are equal; the trees lead with `batch_dims` axes."""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    found = [(x == y).flatten(batch_dims).all(-1) if x.ndim > batch_dims else x == y for x, y in pairs]
    return torch.stack(found).all(0)


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

    def __init__(self, capacity: int, gamma: float, n_step: int = 1):
        if capacity < 1 or n_step < 1 or not 0 <= gamma <= 1:
            raise ValueError(f"need capacity >= 1, n_step >= 1 and gamma in [0, 1], got {capacity}, {n_step}, {gamma}")
        self.capacity, self.gamma, self.n_step = capacity, gamma, n_step
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
        reached, reward = next_observations(rollout), rollout.reward
        steps = torch.ones_like(reward) if rollout.num_steps is None else rollout.num_steps.to(reward)
        ended = rollout.terminated | rollout.truncated
        goes_on = torch.zeros_like(ended)
        goes_on[:-1] = ~ended[:-1] & same_rows(
            tree_map(lambda v: v[:-1], reached), tree_map(lambda v: v[1:], rollout.obs), 2
        )
        entry = {
            "obs": rollout.obs,
            "action": action,
            "reward": torch.where(rollout.weight > 0, reward, 0.0),
            "discount": self.gamma**steps,
            "next_obs": reached,
            "terminated": rollout.terminated,
            "ended": ended,
            "goes_on": goes_on,
            "weight": rollout.weight,
        }
        self._make_room(entry)
        self._link(rollout.obs)
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

    def _link(self, obs: Tree) -> None:
        """Whether the newest entry goes on with the first one of `obs` (T, B, ...)."""
        if self.filled:
            last = (self.head - 1) % self.slots
            reached = tree_map(lambda v: v[last], self.data["next_obs"])
            same = same_rows(reached, tree_map(lambda v: v[0], obs), 1)
            self.data["goes_on"][last] = ~self.data["ended"][last] & same

    def draw(self, num: int, rng: torch.Generator) -> Tensor:
        """Entry numbers (num,), each stored one equally likely, drawn on the CPU."""
        if not self.filled:
            raise ValueError("nothing to draw from: the replay is empty")
        return torch.randint(len(self), (num,), generator=rng)

    def at(self, index: Tensor) -> Transitions:
        """The decisions `index` (N,), n steps ahead."""
        d, rows, slot = self.data, index % self.num_rows, index // self.num_rows
        reward = torch.zeros_like(d["reward"][slot, rows])
        discount, weight = torch.ones_like(reward), torch.ones_like(reward)
        going, last, now = torch.ones_like(reward, dtype=torch.bool), slot, slot
        for step in range(self.n_step):
            reward = reward + torch.where(going, discount * d["reward"][now, rows], 0.0)
            discount = torch.where(going, discount * d["discount"][now, rows], discount)
            weight = torch.where(going, weight * d["weight"][now, rows], weight)
            last = torch.where(going, now, last)
            if step + 1 < self.n_step:
                going = going & d["goes_on"][now, rows]
                now = (now + 1) % self.slots
        return Transitions(
            obs=tree_map(lambda v: v[slot, rows], d["obs"]),
            action=d["action"][slot, rows],
            reward=reward,
            discount=torch.where(d["terminated"][last, rows], 0.0, discount),
            next_obs=tree_map(lambda v: v[last, rows], d["next_obs"]),
            weight=weight,
            counts=torch.ones_like(d["action"][slot, rows].flatten(2)[..., 0]),
        )

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
