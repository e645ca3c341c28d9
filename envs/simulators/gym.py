"""Gymnasium: any registered environment id, one copy per row, in this process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlflow.envs.seeds import numpy_seed
from rlflow.envs.sim import Outcome, Sim, SimEnv
from rlflow.envs.simulators.success import Success
from rlflow.ranges import Count, Size
from rlflow.types import Tree, as_bytes

try:
    import gymnasium
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install 'rlflow-torch[robots]'", name=error.name) from None

BYTES = 4
"""Of a letter in UTF-8, at most."""

# -- spaces ---------------------------------------------------------------------------------------


def spec_of(space: Any, where: str) -> Tree:
    """Meta tensors of an observation space: Box is float32 (uint8 stays), Dict a dict, Text its bytes; anything else is
    refused."""
    if isinstance(space, gymnasium.spaces.Dict):
        return {name: spec_of(part, f"{where}[{name!r}]") for name, part in space.spaces.items()}
    if isinstance(space, gymnasium.spaces.Text):
        return torch.empty(BYTES * space.max_length, dtype=torch.uint8, device="meta")
    if not isinstance(space, gymnasium.spaces.Box):
        raise ValueError(
            f"{where} is {space}, only Box, Text and Dict of them are read: wrap the environment, "
            "e.g. gymnasium.wrappers.FlattenObservation or TransformObservation"
        )
    dtype = torch.uint8 if space.dtype == np.uint8 else torch.float32
    return torch.empty(space.shape, dtype=dtype, device="meta")


def bounds_of(space: Any, where: str) -> tuple[Tensor, Tensor]:
    """(low, high) of a Box of real actions; anything else is refused."""
    if not isinstance(space, gymnasium.spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise ValueError(
            f"{where} is {space}, a flow policy makes real vectors: use a continuous version of the "
            "environment, or gymnasium.wrappers.TransformAction to read one"
        )
    return torch.tensor(space.low, dtype=torch.float32), torch.tensor(space.high, dtype=torch.float32)


def is_text(rows: Any) -> bool:
    """Whether a batch is of sentences."""
    return len(rows) > 0 and isinstance(rows[0], str)


def convert(rows: Any, spec: Tree) -> Tree:
    """A list of observations, or one batched observation, to tensors (B, ...) of their own."""
    if isinstance(spec, dict):
        part = {n: [row[n] for row in rows] if isinstance(rows, list) else rows[n] for n in spec}
        return {name: convert(part[name], spec[name]) for name in spec}
    if is_text(rows):
        return as_bytes([str(row) for row in rows], spec.shape[0])
    dtype = np.uint8 if spec.dtype == torch.uint8 else np.float32
    return torch.from_numpy(np.array(rows, dtype=dtype))


def row_of(batched: Any, row: int) -> Any:
    """One row of a batched observation, or of an array of observations."""
    return {n: row_of(v, row) for n, v in batched.items()} if isinstance(batched, dict) else batched[row]


def time_limit(max_steps: int | None, spec: Any, what: str) -> int:
    """The steps asked for, or else the registered limit; ValueError where there is none of at least 1."""
    limit = getattr(spec, "max_episode_steps", None) if max_steps is None else max_steps
    if limit is None:
        raise ValueError(f"{what} has no time limit of its own: set max_steps")
    if limit < 1:
        raise ValueError(f"max_steps: an episode of {what} has at least 1 step, got {limit}")
    return int(limit)


# -- one environment per row ----------------------------------------------------------------------


class GymRows(Sim):
    """Environments of your own making, one for each row, stepped one after the other; a row rests after its end.

    `success` names the entry of their info that says whether the task is done, where that is none of `SPELLINGS`.
    """

    def __init__(self, envs: list[Any], what: str, max_steps: int | None = None, success: str | None = None):
        self.envs, self.num_envs, self.success = envs, len(envs), Success(success)
        self.horizon = time_limit(max_steps, envs[0].spec, what)
        self.obs_spec = spec_of(envs[0].observation_space, f"the observation space of {what}")
        self.low, self.high = bounds_of(envs[0].action_space, f"the action space of {what}")
        self._dtype = envs[0].action_space.dtype
        self._obs: list[Any] = [None] * len(envs)
        self._over = np.ones(len(envs), bool)

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        """Each row's own `reset(seed=...)`, with NumPy's global generator of that seed: some draw from it."""
        for row in np.flatnonzero(mask.numpy()):
            seed = int(seeds[row])
            with numpy_seed(seed):
                self._obs[row], _ = self.envs[row].reset(seed=seed)
            self._over[row] = False
        return self.observed()

    def observed(self) -> Tree:
        """Of all rows, as they stand."""
        return convert(self._obs, self.obs_spec)

    def advance(self, action: Tensor) -> Outcome:
        """Step the rows that have not ended."""
        actions = action.numpy().astype(self._dtype)
        reward, ends = np.zeros(self.num_envs), np.zeros((2, self.num_envs), bool)
        success = np.full(self.num_envs, np.nan, np.float32)
        for row in np.flatnonzero(~self._over):
            self._obs[row], paid, *ends[:, row], info = self.envs[row].step(actions[row])
            reward[row] = self._number(paid)
            success[row] = self.success.of_row(info)
        self._over |= ends.any(0)
        return Outcome(self.observed(), reward, ends[0], ends[1], info={"success": success})

    def _number(self, reward: Any) -> float:
        """A reward, also one in an array of its own; nan for None, as of a reward that has no score."""
        try:
            return float(np.asarray(reward, np.float64).item())
        except (TypeError, ValueError):
            where = f"{type(self.envs[0].unwrapped).__name__}.step"
            raise ValueError(f"{where}: reward is {reward!r}, it must be one number") from None

    def render(self, row: int, size: tuple[int, int]) -> Tensor:
        """The environment's own picture, scaled to `size`."""
        picture = self.envs[row].render()
        if not isinstance(picture, np.ndarray):
            raise NotImplementedError("no picture: make the environment with options={'render_mode': 'rgb_array'}")
        channels_first = torch.from_numpy(picture.copy()).permute(2, 0, 1).float()
        scaled = torch.nn.functional.interpolate(channels_first[None], size, mode="area")[0]
        return scaled.round().byte().permute(1, 2, 0)


def registered(
    env_id: str,
    num_envs: int,
    max_steps: int | None = None,
    options: dict[str, Any] | None = None,
    success: str | None = None,
) -> GymRows:
    """`num_envs` copies of a registered environment; `options` go to gymnasium.make."""
    if max_steps is not None:
        time_limit(max_steps, None, env_id)  # -1 would tell gymnasium to set none
    settings = {"max_episode_steps": max_steps, "disable_env_checker": True} | (options or {})
    return GymRows([gymnasium.make(env_id, **settings) for _ in range(num_envs)], env_id, max_steps, success)


def gym(
    num_envs: int,
    env_id: str,
    chunk: Size = 1,
    gamma: float = 0.99,
    max_steps: Count | None = None,
    options: dict[str, Any] | None = None,
    success: str | None = None,
) -> SimEnv:
    """Any registered Gymnasium environment with Box or Dict observations and Box actions."""
    return SimEnv(registered(env_id, num_envs, max_steps, options, success), chunk, gamma)
