"""OGBench's puzzles (Park et al. 2024): Lights Out, whose buttons a robot arm presses, and an oracle that solves it.

A press turns a button and its neighbours (up, down, left, right). puzzle_3x3 is the id "puzzle-3x3-singletask-v0",
puzzle_4x4 "puzzle-4x4-singletask-v0": the package's default task 4 of five, 500 steps, 20 a second, reward minus the
number of buttons that are wrong, the end when none is; both are judged before an action, hence told one step later.
Actions: x, y, z, yaw and the gripper, relative.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlflow.console import counted
from rlflow.envs.demos.dataset import Episode
from rlflow.envs.seeds import numpy_seed
from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators.ogbench import CubeSim, demonstration, prototype, steps_of, twin
from rlflow.ranges import Size, Threads

try:
    from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install 'rlflow-torch[manipulation]'", name=error.name) from None

SMALL, LARGE = "puzzle-3x3-singletask-v0", "puzzle-4x4-singletask-v0"
HIGH = 0.16
"""Metres: the arm is above the buttons, as the oracle has it."""
Lights = NDArray[np.int64]


class PuzzleSim(CubeSim):
    """As the cubes, with lights beside the physics: the buttons' states, a row's own."""

    def render(self, row: int, size: tuple[int, int]) -> Tensor:
        """From the camera in front of the table; rows share a model, so its buttons are painted first."""
        env = self.envs[row]
        for lit, geoms in zip(env._cur_button_states, env._button_geom_ids_list, strict=True):
            env.model.geom_rgba[geoms] = env._colors["blue" if lit else "red"]
        return super().render(row, size)

    def state_dict(self) -> dict[str, Any]:
        """Physics as the next step finds it, and the lights."""
        lights = np.stack([env._cur_button_states for env in self.envs])
        return super().state_dict() | {"lights": torch.from_numpy(lights.astype(np.int64))}

    def _restore(self, row: int, state: dict[str, Any]) -> None:
        """What is pressed down already is not pressed again; and to paint the buttons OGBench moves the physics."""
        env = self.envs[row]
        self._place(row, state)
        env.pre_step()
        env._cur_button_states = state["lights"][row].numpy().copy()
        env.post_step()
        self._place(row, state)


# -- demonstrations -------------------------------------------------------------------------------


def pressed(lights: Lights, presses: Lights) -> Lights:
    """(rows, cols) of 0 and 1 after every button of `presses` was pressed once."""
    padded = np.pad(presses, 1)
    around = padded[1:-1, 1:-1] + padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return (lights + around) % 2


def solution(lights: Lights, goal: Lights) -> Lights:
    """(rows, cols) the fewest presses from `lights` to `goal`; ValueError where none lead there.

    What is pressed in the first row decides the rest: what is wrong above a button, it alone can still turn.
    """
    found = []
    for first in product((0, 1), repeat=lights.shape[1]):
        presses = np.zeros_like(lights)
        presses[0] = first
        for row in range(1, len(lights)):
            presses[row] = (pressed(lights, presses) != goal)[row - 1]
        if (pressed(lights, presses) == goal).all():
            found.append(presses)
    if not found:
        raise ValueError("no presses lead from these lights to that goal")
    return min(found, key=lambda presses: int(presses.sum()))


class PuzzleOracle:
    """OGBench's Markov oracle for one button, told the nearest that a shortest solution has left.

    Above the buttons the solution is found anew, so that what noise pressed is made up for.
    """

    def __init__(self, env: Any, seed: int):
        self.env, self.shape = env, (env._num_rows, env._num_cols)
        self.button, self.wanted = 0, int(env._cur_button_states[0])  # nothing to do yet
        self.oracle = ButtonMarkovOracle(env=env, gripper_always_closed=True)
        with numpy_seed(seed):
            self.oracle.reset(None, None)

    def act(self) -> NDArray[np.float64]:
        """The next action (5,)."""
        info, lights = self.env.compute_ob_info(), self.env._cur_button_states
        if lights[self.button] == self.wanted and info["proprio/effector_pos"][2] > HIGH:
            self._aim(lights, info["proprio/effector_pos"])
        target = {"privileged/target_button": self.button, "privileged/target_button_state": self.wanted}
        return self.oracle.select_action(
            None, info | target | {"privileged/target_button_top_pos": self._top(self.button)}
        )

    def _aim(self, lights: Lights, place: NDArray[np.float64]) -> None:
        goal = self.env._target_button_states.reshape(self.shape)
        left = np.flatnonzero(solution(lights.reshape(self.shape), goal)).tolist()
        if left:
            self.button = min(left, key=lambda i: float(np.linalg.norm(self._top(i)[:2] - place[:2])))
            self.wanted = 1 - int(lights[self.button])

    def _top(self, button: int) -> NDArray[np.float64]:
        """(3,) metres, the middle of its top."""
        place: NDArray[np.float64] = self.env.data.site_xpos[self.env._button_site_ids[button]]
        return place.copy()


def episodes(env_id: str, num: int, seed: int, noise: float) -> Iterator[Episode]:
    """`num` demonstrations by the oracle from `seed` on, noise of that std on each number of its actions."""
    env = twin(prototype(env_id))
    for episode in counted(num, "episodes"):
        yield demonstration(env, steps_of(env_id), seed + episode, noise, oracle=PuzzleOracle)


def small_episodes(num: int, seed: int, noise: float) -> Iterator[Episode]:
    """Those of puzzle_3x3."""
    return episodes(SMALL, num, seed, noise)


def large_episodes(num: int, seed: int, noise: float) -> Iterator[Episode]:
    """Those of puzzle_4x4."""
    return episodes(LARGE, num, seed, noise)


# -- environments ---------------------------------------------------------------------------------


def puzzle_3x3(
    num_envs: int, chunk: Size = 5, gamma: float = 0.99, sparse: bool = False, threads: Threads = 0
) -> SimEnv:
    """puzzle-3x3-singletask-v0: nine buttons, 55 numbers observed; 500 steps."""
    return SimEnv(PuzzleSim(SMALL, num_envs, sparse, threads), chunk, gamma)


def puzzle_4x4(
    num_envs: int, chunk: Size = 5, gamma: float = 0.99, sparse: bool = False, threads: Threads = 0
) -> SimEnv:
    """puzzle-4x4-singletask-v0: sixteen buttons, 83 numbers observed; 500 steps."""
    return SimEnv(PuzzleSim(LARGE, num_envs, sparse, threads), chunk, gamma)
