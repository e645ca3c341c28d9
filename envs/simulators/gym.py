"""Gymnasium: any registered environment id, one copy per row, and any VectorEnv in its three autoreset modes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlflow.envs.sim import Outcome, Sim, SimEnv
from rlflow.envs.simulators.success import Success
from rlflow.ranges import Count, Size
from rlflow.types import Tree, tree_map, tree_where

try:
    import gymnasium
    from gymnasium.vector import AutoresetMode
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install 'rlflow-torch[robots]'", name=error.name) from None

# -- spaces ---------------------------------------------------------------------------------------


def spec_of(space: Any, where: str) -> Tree:
    """Meta tensors of an observation space: Box is float32 (uint8 stays), Dict a dict; anything else is refused."""
    if isinstance(space, gymnasium.spaces.Dict):
        return {name: spec_of(part, f"{where}[{name!r}]") for name, part in space.spaces.items()}
    if not isinstance(space, gymnasium.spaces.Box):
        raise ValueError(
            f"{where} is {space}, only Box and Dict of Box are read: wrap the environment, "
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


def convert(rows: Any, spec: Tree) -> Tree:
    """A list of observations, or one batched observation, to tensors (B, ...) of their own."""
    if isinstance(spec, dict):
        part = {n: [row[n] for row in rows] if isinstance(rows, list) else rows[n] for n in spec}
        return {name: convert(part[name], spec[name]) for name in spec}
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


class GymSim(Sim):
    """`num_envs` copies of a registered environment, stepped one after the other; a row rests after its end.

    `options` go to gymnasium.make; `success` names the entry of its info that says whether the task is done, where
    that is none of `SPELLINGS`.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        max_steps: int | None = None,
        options: dict[str, Any] | None = None,
        success: str | None = None,
    ):
        if max_steps is not None:
            time_limit(max_steps, None, env_id)  # -1 would tell gymnasium to set none
        settings = {"max_episode_steps": max_steps, "disable_env_checker": True} | (options or {})
        self.envs = [gymnasium.make(env_id, **settings) for _ in range(num_envs)]
        self.num_envs, self.success = num_envs, Success(success)
        self.horizon = time_limit(max_steps, self.envs[0].spec, env_id)
        self.obs_spec = spec_of(self.envs[0].observation_space, f"the observation space of {env_id}")
        self.low, self.high = bounds_of(self.envs[0].action_space, f"the action space of {env_id}")
        self._dtype = self.envs[0].action_space.dtype
        self._obs: list[Any] = [None] * num_envs
        self._over = np.ones(num_envs, bool)

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        """Each row's own `reset(seed=...)`."""
        for row in np.flatnonzero(mask.numpy()):
            self._obs[row], _ = self.envs[row].reset(seed=int(seeds[row]))
            self._over[row] = False
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
        told = {"success": success}
        return Outcome(convert(self._obs, self.obs_spec), reward, ends[0], ends[1], info=told)

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
    return SimEnv(GymSim(env_id, num_envs, max_steps, options, success), chunk, gamma)


# -- a VectorEnv ----------------------------------------------------------------------------------


class VectorSim(Sim):
    """A VectorEnv whose rows start anew by themselves: what they reached is kept apart from what they start from."""

    max_chunk = 1

    def __init__(self, env: Any, max_steps: int | None = None, success: str | None = None):
        self.env, self.num_envs, self.success = env, env.num_envs, Success(success)
        self.horizon = time_limit(max_steps, env.spec, str(env))
        self.obs_spec = spec_of(env.single_observation_space, f"the observation space of {env}")
        self.low, self.high = bounds_of(env.single_action_space, f"the action space of {env}")
        self._obs: Tree = None
        self._ended = np.zeros(self.num_envs, bool)

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        """Of all rows from their seeds; of rows that have just ended nothing is left to do."""
        wanted = mask.numpy()
        if (wanted & ~self._ended).any():
            if not wanted.all():
                raise ValueError(
                    f"{self.env} resets rows by itself, not on demand: make it with autoreset_mode=DISABLED, "
                    "and with the time limit of the environment itself"
                )
            self._obs = convert(self._start(seeds.tolist()), self.obs_spec)
        self._ended = np.zeros(self.num_envs, bool)
        return self._obs

    def _start(self, seeds: list[int]) -> Any:
        """First observations of all rows, each from its seed."""
        return self.env.reset(seed=seeds)[0]

    def advance(self, action: Tensor) -> Outcome:
        """One step of all rows."""
        actions = action.numpy().astype(self.env.single_action_space.dtype)
        obs, reward, terminated, truncated, info = self.env.step(actions)
        self._obs = convert(obs, self.obs_spec)
        self._ended = terminated | truncated
        return Outcome(
            self._reached(info),
            np.array(reward, np.float32),
            np.array(terminated),
            np.array(truncated),
            self._executed(),
            {"success": self.success.of_rows(info, self.num_envs)},
        )

    def _reached(self, info: dict[str, Any]) -> Tree:
        """Observations before any reset."""
        return self._obs

    def _executed(self) -> Tensor | None:
        """Rows whose action counted."""
        return None


class SameStepSim(VectorSim):
    """AutoresetMode.SAME_STEP: the step that ends an episode answers with the next one's first observation."""

    def _reached(self, info: dict[str, Any]) -> Tree:
        rows = np.flatnonzero(self._ended)
        if not len(rows):
            return self._obs
        last = convert([row_of(info["final_obs"], int(row)) for row in rows], self.obs_spec)
        mask, slot = torch.from_numpy(self._ended), torch.from_numpy(np.cumsum(self._ended) - 1).clamp(min=0)
        return tree_where(mask, tree_map(lambda v: v[slot], last), self._obs)


class NextStepSim(VectorSim):
    """AutoresetMode.NEXT_STEP: the step after an end ignores its action, so that step is not valid."""

    def __init__(self, env: Any, max_steps: int | None = None, success: str | None = None):
        super().__init__(env, max_steps, success)
        self._starting: NDArray[np.bool_] = np.zeros(self.num_envs, bool)

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        """An ended row shows what it reached until the next step starts it anew."""
        self._starting = self._ended & mask.numpy()
        return super().reset(seeds, mask)

    def _executed(self) -> Tensor:
        executed, self._starting = ~self._starting, np.zeros(self.num_envs, bool)
        return torch.from_numpy(executed)


class OnDemandSim(VectorSim):
    """AutoresetMode.DISABLED: rows are reset on demand, each from its seed."""

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        """Exactly the rows of `mask`."""
        if bool(mask.any()):
            options = {} if bool(mask.all()) else {"options": {"reset_mask": mask.numpy()}}
            obs, _ = self.env.reset(seed=seeds.tolist(), **options)
            self._obs = convert(obs, self.obs_spec)
        return self._obs


MODES = {
    AutoresetMode.SAME_STEP: SameStepSim,
    AutoresetMode.NEXT_STEP: NextStepSim,
    AutoresetMode.DISABLED: OnDemandSim,
}


def gym_vector(env: Any, gamma: float = 0.99, max_steps: int | None = None, success: str | None = None) -> SimEnv:
    """A Gymnasium VectorEnv of yours, in whichever autoreset mode it was made; no action chunks."""
    mode = env.metadata.get("autoreset_mode")
    if mode not in MODES:
        raise ValueError(f"{env} does not say how it resets: set metadata['autoreset_mode'] to an AutoresetMode")
    return SimEnv(MODES[mode](env, max_steps, success), 1, gamma)
