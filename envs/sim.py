"""Simulators as environments: a Sim makes primitive steps, SimEnv turns any of them into a VecEnv.

One action of SimEnv is a chunk of H primitive actions. With h <= H of them carried out,

    reward = sum_{i < h} gamma^i r_i,     num_steps = h,

and the learner discounts the next value by gamma^h. A row that ends in mid-chunk carries out nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlflow.envs.base import VecEnv
from rlflow.envs.bounds import Bounds
from rlflow.envs.contract import check_columns, check_observation
from rlflow.envs.seeds import episode_seeds
from rlflow.types import Step, Tree, tree_map, tree_where


@dataclass(frozen=True)
class Outcome:
    """What a simulator answers to one primitive action per row; all tensors lead with B."""

    obs: Tree  # as reached, before any reset; may be a buffer that the next call overwrites
    reward: Tensor  # (B,) float
    terminated: Tensor  # (B,) bool
    truncated: Tensor | None = None  # (B,) bool, cut off by the simulator itself; time limits are SimEnv's
    executed: Tensor | None = None  # (B,) bool, False where the action was not carried out; None = all were
    info: dict[str, Tensor] = field(default_factory=dict)  # (B,) floats; "success" is kept over the episode


class Sim:
    """A batch of B simulations that never reset themselves. What happens to a row after its end is of no account."""

    num_envs: int
    """B, rows of this process."""
    low: Tensor
    high: Tensor
    """(*A,) bounds of one primitive action; infinite where there is none, on one side or on both."""
    obs_spec: Tree
    """One row's observation as meta tensors: shapes and dtypes (float32, or uint8 for pixels)."""
    horizon: int
    """Time limit in primitive steps."""
    max_chunk: int | None = None
    """Longest chunk it can take part in; 1 when an ended row starts anew by itself."""
    device: torch.device = torch.device("cpu")
    step_seconds: float = 0.04
    """Of a primitive step, by which films are timed."""
    tasks: Sequence[str] = ()
    """Names of what rows are asked to do, where that differs; `asked` (B,) are their numbers then."""
    asked: Tensor
    exact_resume: bool = False
    """True when `state_dict` holds the whole state."""

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        """Start the rows of `mask` (B,) from seeds (B,); observations of all rows (B, ...)."""
        raise NotImplementedError

    def advance(self, action: Tensor) -> Outcome:
        """One primitive action (B, *A) per row, inside the bounds."""
        raise NotImplementedError

    def render(self, row: int, size: tuple[int, int]) -> Tensor:
        """A picture (H, W, 3) uint8 of one row's state, which it does not change."""
        raise NotImplementedError(f"{type(self).__name__} draws no pictures: give it a `render(row, size)`")

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""


class SimEnv(VecEnv):
    """A Sim with action chunks, time limit, automatic reset and episode statistics.

    Actions are clipped to [-1, 1] and stretched to the simulator's bounds (`Bounds`). An ended row starts its next
    episode at the end of the chunk, from `episode_seeds(first seed, episode number)`.
    `info` holds "episode_return" (undiscounted), "episode_length" (primitive steps) and, where the simulator
    knows it, "success" (ever reached in the episode): nan except where an episode has just ended, and where nothing
    told it in the whole episode. Other columns of the simulator are those of the last primitive step carried out.
    """

    COUNTERS = ("first", "episode", "elapsed", "returns", "success")

    def __init__(self, sim: Sim, chunk: int = 1, gamma: float = 0.99):
        if chunk < 1 or not 0 < gamma <= 1:
            raise ValueError(f"need chunk >= 1 and 0 < gamma <= 1, got {chunk} and {gamma}")
        if sim.max_chunk is not None and chunk > sim.max_chunk:
            raise ValueError(
                f"{type(sim).__name__} cannot hold a row that ended in mid-chunk: use chunk={sim.max_chunk}"
            )
        if sim.horizon < 1:
            raise ValueError(f"{type(sim).__name__}: the time limit must be at least 1 step, got horizon={sim.horizon}")
        self.sim, self.chunk, self.gamma = sim, chunk, gamma
        self.num_envs, self.device, self.obs_spec = sim.num_envs, sim.device, sim.obs_spec
        self.action_shape = (chunk, *sim.low.shape)
        self.horizon = -(-sim.horizon // chunk)
        self.exact_resume, self.step_seconds, self.tasks = sim.exact_resume, sim.step_seconds, sim.tasks
        self.bounds, self._looked = Bounds(sim.low, sim.high), False
        self._action = torch.zeros(self.num_envs, *self.action_shape, device=self.device)
        self._nan = torch.full((), torch.nan, device=self.device)
        self.first, self.episode, self.elapsed = torch.zeros(3, self.num_envs, dtype=torch.long, device=self.device)
        self.returns = torch.zeros(self.num_envs, device=self.device)
        self.success = torch.full_like(self.returns, torch.nan)

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        """Episode 0 of `seeds` (B,) in the rows of `mask`; observations (B, ...)."""
        seeds = seeds.to(self.device)
        mask = torch.ones_like(seeds, dtype=torch.bool) if mask is None else mask.to(self.device)
        self.first = torch.where(mask, seeds, self.first)
        self.episode = torch.where(mask, 0, self.episode)
        return self._begin(mask)

    def _begin(self, mask: Tensor) -> Tree:
        """Start the current episode of the rows of `mask`."""
        self.elapsed = torch.where(mask, 0, self.elapsed)
        self.returns = torch.where(mask, 0.0, self.returns)
        self.success = torch.where(mask, torch.nan, self.success)
        return tree_map(torch.clone, self.sim.reset(episode_seeds(self.first, self.episode), mask))

    def send(self, action: Tensor, rows: slice) -> None:
        """Keep the chunks (rows, H, *A)."""
        self._action[rows] = action.detach().to(self._action)

    def recv(self) -> Step:
        """Carry out the chunks sent."""
        action = self.bounds(self._action)
        before, reward = self.elapsed, torch.zeros_like(self.returns)
        terminated = truncated = ended = torch.zeros_like(self.first, dtype=torch.bool)
        reached: Tree = None
        info: dict[str, Tensor] = {}
        for i in range(self.chunk):
            out = self.sim.advance(action[:, i])
            if not self._looked:
                self._look(out)
            if self.watch is not None:
                self.watch()
            live = ~ended if out.executed is None else out.executed & ~ended
            gain = torch.where(live, out.reward, 0.0)
            reward = reward + self.gamma**i * gain
            self._count(live, gain, out.info)
            late = self.elapsed >= self.sim.horizon
            terminated = terminated | (live & out.terminated)
            truncated = truncated | (live & (late if out.truncated is None else late | out.truncated))
            # copied, for it may be a buffer that the simulator's next call overwrites
            reached = tree_map(torch.clone, out.obs) if i == 0 else tree_where(live, out.obs, reached)
            info = dict(out.info) if i == 0 else tree_where(live, out.info, info)
            ended = terminated | truncated
        num_steps = self.elapsed - before
        info |= self._statistics(ended, info)
        self.episode = self.episode + ended
        nothing_ended = self.device.type == "cpu" and not bool(ended.any())  # elsewhere the answer would be waited for
        obs = reached if nothing_ended else self._begin(ended)
        cut = truncated & ~terminated
        return Step(obs, reward.float(), terminated, cut, reached, num_steps > 0, info, num_steps=num_steps)

    def _look(self, out: Outcome) -> None:
        """ValueError where the simulator's first answer has shapes or dtypes that would broadcast in silence."""
        where, num = f"{type(self.sim).__name__}.advance", self.num_envs
        check_observation(f"{where}: obs", num, out.obs, self.obs_spec)
        check_columns(where, num, "float", {"reward": out.reward})
        flags = {"terminated": out.terminated, "truncated": out.truncated, "executed": out.executed}
        check_columns(where, num, "bool", flags)
        check_columns(where, num, "real", {f"info[{name!r}]": value for name, value in out.info.items()})
        self._looked = True

    @property
    def asked(self) -> Tensor:
        """Of the episodes that run now."""
        return self.sim.asked if self.tasks else super().asked

    @property
    def earned(self) -> Tensor:
        """Of the episodes that run now."""
        return self.returns

    def render(self, row: int, size: tuple[int, int] = (192, 192)) -> Tensor:
        """A picture (H, W, 3) uint8 of one row as it stands, the first state of the next episode after an end."""
        return self.sim.render(row, size)

    def _count(self, live: Tensor, gain: Tensor, info: dict[str, Tensor]) -> None:
        """One primitive step of the rows of `live` in the books."""
        self.elapsed = self.elapsed + live
        self.returns = self.returns + gain
        if "success" in info:
            best = torch.fmax(self.success, info["success"])  # nan: not told at this step
            self.success = torch.where(live, best, self.success)

    def _statistics(self, ended: Tensor, info: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the episodes that have just ended; nan elsewhere."""
        found = {"episode_return": self.returns.float(), "episode_length": self.elapsed.float()}
        if "success" in info:
            found["success"] = self.success
        return {name: torch.where(ended, value, self._nan) for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """Counters and the simulator's state; {} when that cannot be saved (`exact_resume` is False then)."""
        if not self.exact_resume:
            return {}
        return {name: getattr(self, name).clone() for name in self.COUNTERS} | {"sim": self.sim.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        if not state:
            return
        for name in self.COUNTERS:
            setattr(self, name, state[name].to(self.device, copy=True))
        self.sim.load_state_dict(state["sim"])
