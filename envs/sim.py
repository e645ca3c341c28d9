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

from rlflow.envs.arithmetic import ON_CPU, ON_DEVICE, Rows, as_tensors, copied, renewed
from rlflow.envs.base import VecEnv
from rlflow.envs.bounds import Bounds
from rlflow.envs.contract import check_columns, check_observation
from rlflow.envs.seeds import episode_seeds
from rlflow.types import Step, Tree


@dataclass  # not frozen: that would double what it costs to make one, once a physics step
class Outcome:
    """What a simulator answers to one primitive action per row: tensors, or on the CPU arrays, that lead with B.

    They may be buffers that the next call overwrites.
    """

    obs: Tree  # as reached, before any reset
    reward: Rows  # float
    terminated: Rows  # bool
    truncated: Rows | None = None  # bool, cut off by the simulator itself; time limits are SimEnv's
    executed: Rows | None = None  # bool, False where the action was not carried out; None = all were
    info: dict[str, Rows] = field(default_factory=dict)  # floats; "success" is kept over the episode


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
    arrays: bool = False
    """True where `advance` is to be given an array, which costs less: simulators on the CPU alone."""
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

    def advance(self, action: Any) -> Outcome:
        """One primitive action (B, *A) per row, inside the bounds: a tensor, unless `arrays`."""
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

    STATISTICS = ("episode_return", "episode_length")
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
        self._math = ON_CPU if self.device.type == "cpu" else ON_DEVICE
        array, zeros = self._math.array, torch.zeros(self.num_envs, device=self.device)
        self._action = array(torch.zeros(self.num_envs, *self.action_shape, device=self.device))
        self._offer = as_tensors if self._math is ON_CPU and not sim.arrays else (lambda action: action)
        self.first, self.episode, self.elapsed = (array(zeros.long()) for _ in range(3))
        self.returns, self._nan, self._nobody = array(zeros), array(zeros * torch.nan), array(zeros.bool())
        self.success = self._nan
        self._resting: Rows | None = None
        # of a step in which nothing ended and everyone played; nobody writes to what a Step holds
        self._never, self._always, self._blank = zeros.bool(), ~zeros.bool(), zeros * torch.nan
        self._one, self._limit = (array(torch.full_like(zeros, n, dtype=torch.long)) for n in (1, sim.horizon))
        self._untold = dict.fromkeys(self.STATISTICS, self._blank)
        self._whole = torch.full_like(self._never, chunk, dtype=torch.long)

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        """Episode 0 of `seeds` (B,) in the rows of `mask`; observations (B, ...)."""
        seeds, where = self._math.array(seeds.to(self.device)), self._math.where
        begin = ~self._nobody if mask is None else self._math.array(mask.to(self.device))
        self.first = where(begin, seeds, self.first)
        self.episode = where(begin, 0, self.episode)
        if self._resting is not None:
            self._resting = self._math.some(self._resting & ~begin)
        return self._begin(begin)

    def _begin(self, mask: Rows) -> Tree:
        """Start the current episode of the rows of `mask`."""
        where, tensor = self._math.where, self._math.tensor
        self.elapsed = where(mask, 0, self.elapsed)
        self.returns = where(mask, 0.0, self.returns)
        self.success = where(mask, self._nan, self.success)
        seeds = episode_seeds(self.first, self.episode)
        return copied(self.sim.reset(tensor(seeds), tensor(mask)))

    def send(self, action: Tensor, rows: slice) -> None:
        """Keep the chunks (rows, H, *A)."""
        self._action[rows] = self._math.action(action, self._action)

    def recv(self) -> Step:
        """Carry out the chunks sent."""
        math, before, chunk = self._math, self.elapsed, self.bounds(self._action)
        reward: Rows = None
        terminated = truncated = self._nobody
        ended: Rows | None = None  # nobody
        whole = True
        reached: Tree = None
        info: dict[str, Tensor] = {}
        for i in range(self.chunk):
            out = self.sim.advance(self._offer(chunk[:, i]))
            if not self._looked:
                self._look(out)
            if self.watch is not None:
                self.watch()
            live = self._live(out, self._resting, ended)
            whole = whole and live is None
            gain = self._count(live, out)
            if i:
                reward = reward + self.gamma**i * gain
            else:
                reward = gain if self.chunk == 1 else 1.0 * gain  # the next call may overwrite it
            done, late = math.array(out.terminated), self._late(out)
            if live is not None:
                done, late = live & done, live & late
            if math.some(done | late) is not None:
                terminated, truncated = terminated | done, truncated | late
                ended = terminated | truncated
            if live is None or not i:
                reached, info = copied(out.obs), copied(out.info)
            else:
                reached, info = renewed(live, out.obs, reached), renewed(live, out.info, info)
        num_steps = self._whole if whole else math.tensor(self.elapsed - before)
        step = self._quiet(reached, math.floats(reward), info, num_steps)
        return step if ended is None else self._ended(step, terminated, truncated, ended)

    def _live(self, out: Outcome, *idle: Rows | None) -> Rows | None:
        """(B,) rows that carried the action out, none of those of `idle`; None where all did."""
        live = None if out.executed is None else self._math.array(out.executed)
        for rows in idle:
            if rows is not None:
                live = ~rows if live is None else live & ~rows
        return live

    def _count(self, live: Rows | None, out: Outcome) -> Rows:
        """(B,) rewards of a primitive step of the rows of `live`, which enters the books."""
        math = self._math
        gain = math.array(out.reward)
        if live is not None:
            gain = math.where(live, gain, 0.0)
        self.elapsed, self.returns = self.elapsed + (self._one if live is None else live), self.returns + gain
        if "success" in out.info:
            best = math.fmax(self.success, math.array(out.info["success"]))  # nan: not told at this step
            self.success = best if live is None else math.where(live, best, self.success)
        return gain

    def _late(self, out: Outcome) -> Rows:
        """(B,) rows that are cut off, by time or by the simulator."""
        late = self.elapsed >= self._limit
        return late if out.truncated is None else late | self._math.array(out.truncated)

    def _quiet(self, reached: Tree, reward: Tensor, info: dict[str, Tensor], num_steps: Tensor) -> Step:
        """A step in which no episode ended."""
        info = info | self._untold if "success" not in info else info | self._untold | {"success": self._blank}
        valid = self._always if num_steps is self._whole else num_steps > 0
        return Step(reached, reward, self._never, self._never, reached, valid, info, num_steps=num_steps)

    def _ended(self, step: Step, terminated: Rows, truncated: Rows, ended: Rows) -> Step:
        """The step in which episodes of the rows of `ended` did; they begin anew."""
        math = self._math
        told = {"episode_return": self.returns, "episode_length": self.elapsed, "success": self.success}
        told = {name: math.floats(math.where(ended, told[name], self._nan)) for name in told if name in step.info}
        flags = math.tensor(terminated), math.tensor(truncated & ~terminated)
        obs = step.obs
        if self.once and self.sim.max_chunk is None:
            self._resting = ended if self._resting is None else self._resting | ended
        else:
            self.episode = self.episode + ended
            obs = self._begin(ended)
        return Step(obs, step.reward, *flags, step.final_obs, step.valid, step.info | told, num_steps=step.num_steps)

    def _look(self, out: Outcome) -> None:
        """ValueError where the simulator's first answer has shapes or dtypes that would broadcast in silence."""
        out = Outcome(**{name: as_tensors(part) for name, part in vars(out).items()})
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
        return torch.as_tensor(self.returns).clone()

    def render(self, row: int, size: tuple[int, int] = (192, 192)) -> Tensor:
        """A picture (H, W, 3) uint8 of one row as it stands, the first state of the next episode after an end."""
        return self.sim.render(row, size)

    def state_dict(self) -> dict[str, Any]:
        """Counters and the simulator's state; {} when that cannot be saved (`exact_resume` is False then)."""
        if not self.exact_resume:
            return {}
        kept = {name: self._math.tensor(getattr(self, name)).clone() for name in self.COUNTERS}
        return kept | {"sim": self.sim.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        if not state:
            return
        for name in self.COUNTERS:
            setattr(self, name, self._math.array(state[name].to(self.device, copy=True)))
        self.sim.load_state_dict(state["sim"])
