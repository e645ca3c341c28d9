"""Gymnasium's vector environments: anybody's VectorEnv in its three autoreset modes, and rows in their own processes.

A VectorEnv that starts ended rows anew by itself has no action chunks: the rest of a chunk would be carried out in the
next episode. Rows that are made here, from an id, wait after their end, so they have.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from torch import Tensor

from rlflow import registry
from rlflow.envs.seeds import numpy_seed
from rlflow.envs.sim import Outcome, Sim, SimEnv
from rlflow.envs.simulators.gym import bounds_of, convert, registered, row_of, spec_of, time_limit
from rlflow.envs.simulators.spoken import Spoken
from rlflow.envs.simulators.success import Success
from rlflow.ranges import Count, Size
from rlflow.types import Tree, tree_map, tree_where


class VectorSim(Sim):
    """A VectorEnv whose rows start anew by themselves: what they reached is kept apart from what they start from."""

    max_chunk: int | None = 1

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


def of_vector(env: Any, max_steps: int | None = None, success: str | None = None) -> VectorSim:
    """A VectorEnv in whichever autoreset mode it was made; ValueError where it does not say."""
    mode = env.metadata.get("autoreset_mode")
    if mode not in MODES:
        raise ValueError(f"{env} does not say how it resets: set metadata['autoreset_mode'] to an AutoresetMode")
    return MODES[mode](env, max_steps, success)


def vector_env(env: Any, gamma: float = 0.99, max_steps: int | None = None, success: str | None = None) -> SimEnv:
    """A Gymnasium VectorEnv of yours; no action chunks."""
    return SimEnv(of_vector(env, max_steps, success), 1, gamma)


# -- rows in processes ----------------------------------------------------------------------------

ENDS, RESTS = ("rlflow_terminated", "rlflow_truncated"), "rlflow_rests"
"""Entries of `info` in which a held environment tells of its end."""


class Held(gymnasium.Wrapper):
    """Waits after its end, which it tells in `info` alone: no VectorEnv starts it anew."""

    over = False
    last: Any = None

    def reset(self, *, seed: int | None = None, **settings: Any) -> Any:
        """Another episode; NumPy's global generator has its seed meanwhile: some environments draw from it."""
        self.over = False
        with numpy_seed(seed):
            return self.env.reset(seed=seed, **settings)

    def step(self, action: Any) -> Any:
        """A step, or nothing after the end."""
        if self.over:
            return self.last, 0.0, False, False, {ENDS[0]: False, ENDS[1]: False, RESTS: True}
        self.last, reward, *ends, info = self.env.step(action)
        self.over = any(ends)
        told = dict(zip(ENDS, map(bool, ends), strict=True))
        return self.last, reward, False, False, {**info, **told, RESTS: False}


class HeldSim(OnDemandSim):
    """Held environments in a VectorEnv: action chunks of any length, rows reset on demand."""

    max_chunk = None

    def advance(self, action: Tensor) -> Outcome:
        """One step of the rows that have not ended."""
        actions = action.numpy().astype(self.env.single_action_space.dtype)
        obs, reward, _, _, info = self.env.step(actions)
        self._obs = convert(obs, self.obs_spec)
        terminated, truncated, rests = (torch.from_numpy(np.array(info[name], bool)) for name in (*ENDS, RESTS))
        told = {"success": torch.from_numpy(self.success.of_rows(info, self.num_envs))}
        paid = torch.from_numpy(np.array(reward, np.float32))
        return Outcome(self._obs, paid, terminated, truncated, ~rests, told)

    def close(self) -> None:
        """End the processes."""
        self.env.close()


def in_processes(makers: Sequence[Callable[[], Any]], max_steps: int | None, success: str | None) -> HeldSim:
    """A process for each environment. Texts come by pipe: Gymnasium's shared memory spells them anew."""
    held = [_held(make) for make in makers]
    one = makers[0]()
    shared = not _has_text(one.observation_space)
    one.close()
    settings: dict[str, Any] = {"context": "forkserver", "autoreset_mode": AutoresetMode.DISABLED}
    return HeldSim(gymnasium.vector.AsyncVectorEnv(held, shared_memory=shared, **settings), max_steps, success)


def _has_text(space: Any) -> bool:
    inside = space.values() if isinstance(space, gymnasium.spaces.Dict) else ()
    return isinstance(space, gymnasium.spaces.Text) or any(map(_has_text, inside))


def _held(make: Callable[[], Any]) -> Callable[[], Held]:
    return lambda: Held(make())


# -- by name --------------------------------------------------------------------------------------


def gym_vector(
    num_envs: int,
    env_id: str | None = None,
    make: str | None = None,
    chunk: Size = 1,
    gamma: float = 0.99,
    max_steps: Count | None = None,
    options: dict[str, Any] | None = None,
    success: str | None = None,
    processes: bool = False,
    sentence: str | None = None,
    sentence_from: str | None = None,
) -> SimEnv:
    """Environments with pictures, numbers and sentences: a registered id, or a function that makes a VectorEnv.

    `env_id`: of Gymnasium; its own VectorEnv where it registers one, else one environment for each row, with
    `processes` each in its own. `make`: "module:function", called with num_envs and `options`. What is asked of the
    robot is a Text in the observation, or `sentence`, or what the environments' attribute `sentence_from` says after a
    reset; it is observed as "task". Chunks longer than 1 need rows that wait after their end: an id without a VectorEnv
    of its own.
    """
    if (env_id is None) == (make is None):
        raise ValueError("give env_id, a registered id, or make, a function that makes a VectorEnv: one of the two")
    if processes and make is not None:
        raise ValueError("processes are of env_id; what make makes has its own: leave processes out")
    if sentence is not None and sentence_from is not None:
        raise ValueError("sentence and sentence_from both say what is asked: give one of them")
    sim = _sim(num_envs, env_id, make, max_steps, options or {}, success, processes)
    if sentence is not None:
        sim = Spoken(sim, lambda: [sentence] * num_envs)
    if sentence_from is not None:
        sim = Spoken(sim, _asking(sim, sentence_from))
    return SimEnv(sim, chunk, gamma)


def _sim(
    num_envs: int,
    env_id: str | None,
    make: str | None,
    max_steps: int | None,
    options: dict[str, Any],
    success: str | None,
    processes: bool,
) -> Sim:
    if make is not None:
        return of_vector(registry.imported(make)(num_envs=num_envs, **options), max_steps, success)
    assert env_id is not None
    spec = _spec(env_id)
    if spec.vector_entry_point is not None:
        given = {} if max_steps is None else {"max_episode_steps": max_steps}
        mode = gymnasium.VectorizeMode.VECTOR_ENTRY_POINT
        return of_vector(gymnasium.make_vec(env_id, num_envs, mode, **given, **options), max_steps, success)
    if not processes:
        return registered(env_id, num_envs, max_steps, options, success)
    limit = time_limit(max_steps, spec, env_id)
    settings = {"max_episode_steps": limit, "disable_env_checker": True} | options
    return in_processes([Make(spec, settings)] * num_envs, limit, success)


def _spec(env_id: str) -> Any:
    """What is registered under an id, "module:id" too, as gymnasium.make reads it."""
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    return gymnasium.spec(name)


class Make:
    """gymnasium.make of what is registered here, which another process need not know."""

    def __init__(self, spec: Any, settings: dict[str, Any]):
        self.spec, self.settings = spec, settings

    def __call__(self) -> Any:
        """A new environment."""
        return gymnasium.make(self.spec, **self.settings)


def _asking(sim: Any, attribute: str) -> Callable[[], Sequence[str]]:
    """What the environments of a simulation say under a name."""

    def ask() -> Sequence[str]:
        if hasattr(sim, "envs"):
            return [str(env.get_wrapper_attr(attribute)) for env in sim.envs]
        return [str(told) for told in sim.env.get_attr(attribute)]

    return ask
