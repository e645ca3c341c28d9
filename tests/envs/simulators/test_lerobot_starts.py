"""LIBERO's recorded starts: which one is a function of the seed, for every row and every time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")

import gymnasium

from rlflow.envs.simulators import lerobot
from rlflow.envs.simulators.task_rows import TaskRows


class Recorded(gymnasium.Env):
    """As LIBERO's: a reset takes the next start, whatever the seed."""

    observation_space = gymnasium.spaces.Box(-1e3, 1e3, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    metadata = {"render_modes": []}

    def __init__(self, task: int):
        self.task, self.init_state_id = task, 0

    def reset(self, *, seed=None, options=None):
        """Its number."""
        super().reset(seed=seed)
        start, self.init_state_id = self.init_state_id, self.init_state_id + 1
        return np.array([100 * self.task + start], np.float32), {}

    def step(self, action):
        """Nothing."""
        return np.zeros(1, np.float32), 0.0, False, False, {}


def rows() -> TaskRows:
    vectors = [SimpleNamespace(envs=[Recorded(t)], env_fns=[lambda t=t: Recorded(t)]) for t in range(3)]
    return TaskRows({str(t): lerobot._maker(v, 3) for t, v in enumerate(vectors)}, num_envs=4, max_steps=5)


def test_a_start_is_a_function_of_the_seed():
    sim, seeds, everybody = rows(), torch.tensor([0, 3, 1, 0]), torch.ones(4, dtype=torch.bool)
    wanted = [[0], [1], [100], [0]]
    for _ in range(2):
        assert sim.reset(seeds, everybody).tolist() == wanted


def test_starts_of_a_task_are_taken_in_turn():
    sim, everybody = rows(), torch.ones(4, dtype=torch.bool)
    assert sim.reset(torch.tensor([2, 5, 8, 11]), everybody).flatten().tolist() == [200, 201, 202, 203]


def test_an_environment_without_recorded_starts_is_left_alone():
    env = gymnasium.make("Pendulum-v1")
    vector = SimpleNamespace(envs=[env], env_fns=[lambda: gymnasium.make("Pendulum-v1")])
    assert lerobot._maker(vector, 3)() is env
