"""OGBench (Park et al. 2024): a robot arm that moves one cube or two to a place, and an oracle that shows how.

cube_single is the id "cube-single-singletask-v0", cube_double "cube-double-singletask-v0": the package's default
task 2 of five, 20 actions a second, reward minus the number of cubes not in place, the end when all are (within
4 cm); both are judged before an action, hence told one step later. Actions: x, y, z, yaw and the gripper, relative.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlflow.console import counted
from rlflow.envs.camera import Camera, cloud
from rlflow.envs.demos.dataset import Episode
from rlflow.envs.seeds import numpy_seed
from rlflow.envs.sim import Outcome, Sim, SimEnv
from rlflow.parallel.dist import num_cpus
from rlflow.ranges import Natural, Size, Threads
from rlflow.types import Tree, tree_stack

try:
    import gymnasium
    import mujoco
    import ogbench  # noqa: F401  (registers its ids)
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install 'rlflow-torch[manipulation]'", name=error.name) from None

SINGLE, DOUBLE = "cube-single-singletask-v0", "cube-double-singletask-v0"
KEPT = ("qpos", "qvel", "ctrl", "mocap_pos", "mocap_quat", "qacc_warmstart", "site_xpos", "site_xmat", "cfrc_ext")
"""What the next step and its observation depend on; the last three are one substep older than the positions."""
PROPRIO = 19
"""Numbers of the arm itself, before those of the cubes."""
SPACE = ((0.2, -0.4, 0.004), (0.7, 0.4, 0.45))
"""Corners of the arm's space above the table, in metres: points outside do not count."""
CELL = 0.01
"""Metres: of a cube of this side one point is kept."""


def begin(env: Any, seed: int) -> NDArray[np.float32]:
    """Start an episode; its first observation (D,), a function of the seed alone.

    OGBench's own reset takes two steps with unseeded actions to see the goal, and their forces stay behind.
    """
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of the dtype of its own action space
        env.reset(seed=seed)
    data = env.data
    kept = {name: getattr(data, name).copy() for name in ("qpos", "qvel", "mocap_pos", "mocap_quat")}
    mujoco.mj_resetData(env.model, data)
    for name, value in kept.items():
        getattr(data, name)[:] = value
    mujoco.mj_forward(env.model, data)
    env.pre_step()
    return env.compute_observation().astype(np.float32)


@cache
def prototype(env_id: str) -> Any:
    """The registered environment, compiled, never stepped; to make one takes a second."""
    with warnings.catch_warnings(action="ignore", category=Warning):  # of having no screen, for which nobody asked
        env = gymnasium.make(env_id, disable_env_checker=True).unwrapped
    begin(env, 0)
    return env


def steps_of(env_id: str) -> int:
    """The registered time limit."""
    return int(gymnasium.spec(env_id).max_episode_steps)


def twin(env: Any) -> Any:
    """Another environment like `env`: one megabyte, for it shares the models (120), of which only colours change."""
    other, ik = copy.copy(env), env._ik
    other._data = mujoco.MjData(env.model)
    other._ik = copy.deepcopy(ik, {id(ik._model): ik._model, id(ik._data): mujoco.MjData(ik._model)})
    return other


class CubeSim(Sim):
    """`num_envs` copies of an OGBench cube task, stepped by `threads` threads (0: all CPUs); a row rests after its end.

    `sparse` pays 1 for success instead of OGBench's reward.
    """

    exact_resume = True
    step_seconds = 0.05

    def __init__(self, env_id: str, num_envs: int, sparse: bool = False, threads: int = 0):
        first = prototype(env_id)
        self.num_envs, self.horizon, self.sparse = num_envs, steps_of(env_id), sparse
        self.envs = [twin(first) for _ in range(num_envs)]
        self._obs = np.tile(begin(self.envs[0], 0), (num_envs, 1))
        self._over = np.zeros(num_envs, bool)
        threads = min(threads or num_cpus(), num_envs)
        self._map = map if threads == 1 else ThreadPoolExecutor(threads).map  # physics holds no GIL
        self._camera: Camera | None = None
        self.low, self.high = -torch.ones(5), torch.ones(5)
        self.obs_spec = torch.empty(self._obs.shape[1], device="meta")

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        """The arm anywhere above the table, the cubes within 1 cm of their start, turned at random."""
        for row in np.flatnonzero(mask.numpy()):
            self._obs[row], self._over[row] = begin(self.envs[row], int(seeds[row])), False
        return torch.from_numpy(self._obs)

    def advance(self, action: Tensor) -> Outcome:
        """Step the rows that have not ended."""
        rows, actions = np.flatnonzero(~self._over), action.numpy()
        reward, success = np.zeros((2, self.num_envs), np.float32)
        results = self._map(lambda row: self.envs[row].step(actions[row]), rows)
        for row, (obs, paid, ended, _, told) in zip(rows, results, strict=True):
            self._obs[row], self._over[row], success[row] = obs, ended, told["success"]
            reward[row] = told["success"] if self.sparse else paid
        info = {"success": torch.from_numpy(success)}
        over = torch.from_numpy(self._over.copy())
        return Outcome(torch.from_numpy(self._obs), torch.from_numpy(reward), over, info=info)

    def render(self, row: int, size: tuple[int, int]) -> Tensor:
        """From the camera in front of the table."""
        if self._camera is None or self._camera.size != size:
            self._camera = Camera(self.envs[row].model, size, fixed="front")
        return torch.from_numpy(self._camera.photo(self.envs[row].data))

    def state_dict(self) -> dict[str, Any]:
        """Physics as the next step finds it."""
        kept = {name: np.stack([getattr(env.data, name) for env in self.envs]) for name in KEPT}
        kept["time"] = np.array([env.data.time for env in self.envs])
        return {name: torch.from_numpy(value.copy()) for name, value in (kept | {"obs": self._obs}).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for row in range(self.num_envs):
            self._restore(row, state)
        self._obs[:], self._over[:] = state["obs"].numpy(), False

    def _restore(self, row: int, state: dict[str, Any]) -> None:
        self._place(row, state)
        self.envs[row].post_step()  # success is a function of the positions

    def _place(self, row: int, state: dict[str, Any]) -> None:
        """Put the physics of a row back."""
        data = self.envs[row].data
        for name in KEPT:
            getattr(data, name)[:] = state[name][row].numpy()
        data.time = float(state["time"][row])


class DepthEye:
    """`num` points that the camera in front of the table sees, at most one a cubic centimetre; it tells no colours.

    What is transparent is not there: the goal, which an environment paints and hides as it goes.
    """

    def __init__(self, model: Any, num: int, size: tuple[int, int] = (84, 84)):
        solid = copy.copy(model)
        solid.geom_rgba[solid.geom_rgba[:, 3] < 1, 3] = 0
        self.camera, self.num = Camera(solid, size, fixed="front"), num

    def __call__(self, data: Any) -> NDArray[np.float32]:
        """(num, 3) metres."""
        return cloud(self.camera.points(data), self.num, *SPACE, CELL)

    def beside(self, env: Any, numbers: NDArray[np.float32]) -> Tree:
        """One row's observation of a cloud and the arm's own numbers, instead of all numbers (D,)."""
        return {"cloud": torch.from_numpy(self(env.data)), "state": torch.from_numpy(numbers[:PROPRIO])}


class CubeCloudSim(CubeSim):
    """A cube task seen as {"cloud": (clouds, 3), "state": the arm's 19 numbers}: where the cubes are has to be seen.

    A row is looked at after every `chunk`-th step and at its end, which is all that SimEnv shows of a chunk.
    """

    def __init__(self, env_id: str, num_envs: int, sparse: bool, threads: int, clouds: int, chunk: int):
        super().__init__(env_id, num_envs, sparse, threads)
        if self.horizon % chunk:
            raise ValueError(f"clouds are seen after whole chunks: chunk must divide {self.horizon} steps, got {chunk}")
        self.chunk, self.steps, self._eye = chunk, 0, DepthEye(self.envs[0].model, clouds)
        self._clouds = np.zeros((num_envs, clouds, 3), np.float32)
        self.obs_spec = {name: torch.empty(value.shape[1:], device="meta") for name, value in self._seen().items()}

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        """As without clouds."""
        super().reset(seeds, mask)
        self._look(mask.numpy())
        self.steps = 0
        return self._seen()

    def advance(self, action: Tensor) -> Outcome:
        """As without clouds."""
        resting, out = self._over.copy(), super().advance(action)
        self.steps += 1
        self._look(~resting & (self._over | (self.steps % self.chunk == 0)))
        return replace(out, obs=self._seen())

    def _look(self, mask: NDArray[np.bool_]) -> None:
        for row in np.flatnonzero(mask):
            self._clouds[row] = self._eye(self.envs[row].data)

    def _seen(self) -> dict[str, Tensor]:
        return {"cloud": torch.from_numpy(self._clouds), "state": torch.from_numpy(self._obs[:, :PROPRIO])}

    def state_dict(self) -> dict[str, Any]:
        """With what was seen last."""
        return super().state_dict() | {"cloud": torch.from_numpy(self._clouds.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        super().load_state_dict(state)
        self._clouds[:] = state["cloud"].numpy()


# -- demonstrations -------------------------------------------------------------------------------


class Player(Protocol):
    """Knows what to do next in an environment."""

    def act(self) -> NDArray[np.float64]:
        """The next action (5,)."""


class Oracle:
    """OGBench's Markov oracle for a task of several cubes: one cube after the other, each to its own place."""

    def __init__(self, env: Any, seed: int):
        self.env, self.num_cubes, self.cube = env, len(env.cur_task_info["goal_xyzs"]), 0
        self.oracle = CubeMarkovOracle(env=env)
        with numpy_seed(seed):  # the oracle draws from it
            self.oracle.reset(None, None)

    def act(self) -> NDArray[np.float64]:
        """The next action (5,)."""
        info = self.env.compute_ob_info()
        goals = [self.env.data.body(f"object_target_{i}") for i in range(self.num_cubes)]
        gaps = [np.linalg.norm(goals[i].xpos - info[f"privileged/block_{i}_pos"]) for i in range(self.num_cubes)]
        if gaps[self.cube] < 0.02 and info["proprio/effector_pos"][2] > 0.16:  # let go of, and the arm is above
            self.cube = int(np.argmax(gaps))
        target = {"privileged/target_block": self.cube, "privileged/target_block_pos": goals[self.cube].xpos}
        return self.oracle.select_action(None, info | target | {"privileged/target_block_yaw": np.zeros(1)})


def as_numbers(env: Any, numbers: NDArray[np.float32]) -> Tree:
    """One row's observation of all its numbers (D,)."""
    return torch.from_numpy(numbers)


def episodes(env_id: str, num: int, seed: int, noise: float, clouds: int = 0) -> Iterator[Episode]:
    """`num` demonstrations by the oracle, with the rewards that its actions earned, from `seed` on.

    `noise` is the std of what is added to each number of the oracle's action before it is clipped to [-1, 1].
    """
    env = twin(prototype(env_id))
    see = DepthEye(env.model, clouds).beside if clouds else as_numbers
    for episode in counted(num, "episodes"):
        yield demonstration(env, steps_of(env_id), seed + episode, noise, see)


def single_episodes(num: int, seed: int, noise: float) -> Iterator[Episode]:
    """Those of cube_single."""
    return episodes(SINGLE, num, seed, noise)


def cloud_episodes(num: int, seed: int, noise: float) -> Iterator[Episode]:
    """Those of cube_single, seen as clouds of 256 points."""
    return episodes(SINGLE, num, seed, noise, clouds=256)


def double_episodes(num: int, seed: int, noise: float) -> Iterator[Episode]:
    """Those of cube_double."""
    return episodes(DOUBLE, num, seed, noise)


def demonstration(
    env: Any,
    horizon: int,
    seed: int,
    noise: float,
    see: Callable[[Any, NDArray[np.float32]], Tree] = as_numbers,
    oracle: Callable[[Any, int], Player] = Oracle,
) -> Episode:
    """One episode of the noisy oracle; `see` makes an observation of the environment and its numbers."""
    obs, rng = begin(env, seed), np.random.default_rng(seed)
    player, over, success = oracle(env, seed), False, False
    rows: list[tuple[Tree, Tensor, float]] = []
    while len(rows) < horizon and not over:
        seen = see(env, obs)
        action = np.clip(player.act() + noise * rng.standard_normal(5), -1, 1).astype(np.float32)
        found, reward, over, _, info = env.step(action)
        rows.append((seen, torch.from_numpy(action), reward))
        obs, success = found.astype(np.float32), success or bool(info["success"])
    shown, done, paid = zip(*rows, strict=True)
    ends = {"terminated": bool(over), "truncated": not over, "success": success}
    return Episode(tree_stack(shown), torch.stack(done), torch.tensor(paid), **ends)


# -- environments ---------------------------------------------------------------------------------


def cube_single(
    num_envs: int,
    chunk: Size = 5,
    gamma: float = 0.99,
    sparse: bool = False,
    threads: Threads = 0,
    clouds: Natural = 0,
) -> SimEnv:
    """cube-single-singletask-v0: one cube, 28 numbers observed, or a cloud of so many points and 19; 200 steps."""
    return SimEnv(_sim(SINGLE, num_envs, sparse, threads, clouds, chunk), chunk, gamma)


def cube_double(
    num_envs: int,
    chunk: Size = 5,
    gamma: float = 0.99,
    sparse: bool = False,
    threads: Threads = 0,
    clouds: Natural = 0,
) -> SimEnv:
    """cube-double-singletask-v0: two cubes, 37 numbers observed, or a cloud of so many points and 19; 500 steps."""
    return SimEnv(_sim(DOUBLE, num_envs, sparse, threads, clouds, chunk), chunk, gamma)


def _sim(env_id: str, num_envs: int, sparse: bool, threads: int, clouds: int, chunk: int) -> CubeSim:
    if clouds:
        return CubeCloudSim(env_id, num_envs, sparse, threads, clouds, chunk)
    return CubeSim(env_id, num_envs, sparse, threads)
