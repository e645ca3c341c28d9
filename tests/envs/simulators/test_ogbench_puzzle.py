"""OGBench's puzzles: the registered task step by step, lights that are a row's own, and solutions that are the shortest."""

from itertools import product

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ogbench")

from rlflow.envs.conformance import CHECKS, Subject
from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators import ogbench_puzzle as puzzle
from rlflow.envs.simulators.ogbench import KEPT, begin, prototype, twin
from rlflow.registry import TABLE, find


def limited(limit: int, chunk: int):
    def make(num_envs: int) -> SimEnv:
        sim = puzzle.PuzzleSim(puzzle.SMALL, num_envs, threads=1)
        sim.horizon = limit
        return SimEnv(sim, chunk, 0.9)

    return make


@pytest.mark.parametrize("one", CHECKS, ids=lambda f: f.__name__)
def test_conforms(one):
    one(Subject(limited(6, 2), limited(20, 2), limited(6, 1), num_envs=3, num_steps=7, gamma=0.9))


@given(st.lists(st.integers(0, 1), min_size=18, max_size=18))
def test_a_solution_leads_to_the_goal_and_none_is_shorter(numbers):
    """Every board of 3 x 3 has one solution: it is found. Presses undo themselves, and their order is of no matter."""
    lights, presses = np.array(numbers).reshape(2, 3, 3)
    goal = puzzle.pressed(lights, presses)
    assert (puzzle.solution(lights, goal) == presses).all()
    assert (puzzle.pressed(goal, presses) == lights).all()


def test_of_several_solutions_the_shortest_is_taken():
    """4 x 4: sixteen solutions of each board that has any, against all 65,536 sets of presses."""
    every = np.array(list(product((0, 1), repeat=16))).reshape(-1, 4, 4)
    lights, goal = np.zeros((4, 4), int), np.ones((4, 4), int)
    lead = [presses for presses in every if (puzzle.pressed(lights, presses) == goal).all()]
    assert len(lead) == 16
    assert puzzle.solution(lights, goal).sum() == min(presses.sum() for presses in lead)
    goal[0, 0] = 0
    with pytest.raises(ValueError, match="no presses lead"):
        puzzle.solution(lights, goal)


@pytest.mark.parametrize("env_id", [puzzle.SMALL, puzzle.LARGE])
def test_steps_rewards_and_success_are_those_of_the_registered_id(env_id):
    """Ours is fed what the oracle did; theirs starts from our state. Buttons are pressed on the way."""
    (episode,) = puzzle.episodes(env_id, 1, seed=5, noise=0.0)
    env = SimEnv(puzzle.PuzzleSim(env_id, 1, threads=1))
    obs = env.reset(torch.tensor([5]))
    peer = gymnasium.make(env_id).unwrapped
    begin(peer, 5)
    for expected, action, paid in zip(episode.obs, episode.action, episode.reward, strict=True):
        torch.testing.assert_close(obs[0], expected, rtol=0, atol=0)
        step = env.step(action.view(1, 1, 5))
        found, reward, terminated, _, _ = peer.step(action.numpy())
        np.testing.assert_allclose(step.final_obs[0].numpy(), found.astype(np.float32), rtol=0, atol=0)
        assert (float(step.reward[0]), bool(step.terminated[0])) == (reward, terminated) == (float(paid), terminated)
        obs = step.obs
    assert (episode.success, episode.terminated, episode.truncated) == (True, True, False)
    assert float(step.info["success"][0]) == 1
    assert len(set(episode.reward.tolist())) > 2, "some were right on the way"


def test_a_run_goes_on_in_the_middle_of_a_press():
    """From the state at every step of one press, the next step is the same to the bit, and presses nothing twice."""
    (episode,) = puzzle.episodes(puzzle.SMALL, 1, seed=5, noise=0.0)
    env, other = (SimEnv(puzzle.PuzzleSim(puzzle.SMALL, 1, threads=1)) for _ in range(2))
    env.reset(torch.tensor([5]))
    other.reset(torch.tensor([6]))
    turned = []
    for action in episode.action[:40]:
        other.load_state_dict(env.state_dict())
        steps = [one.step(action.view(1, 1, 5)) for one in (env, other)]
        assert torch.equal(steps[0].obs, steps[1].obs)
        assert torch.equal(steps[0].reward, steps[1].reward)
        turned.append(env.sim.envs[0]._cur_button_states.tolist())
    assert len({tuple(lights) for lights in turned}) > 1, "a button was pressed meanwhile"


def test_lights_are_a_rows_own():
    (episode,) = puzzle.episodes(puzzle.SMALL, 1, seed=5, noise=0.0)
    env = SimEnv(puzzle.PuzzleSim(puzzle.SMALL, 2, threads=1))
    env.reset(torch.tensor([5, 5]))
    before = env.sim.envs[1]._cur_button_states.copy()
    for action in episode.action[:40]:
        env.step(torch.stack([action, torch.zeros(5)]).view(2, 1, 5))
    assert (env.sim.envs[1]._cur_button_states == before).all()
    assert (env.sim.envs[0]._cur_button_states != before).any()
    try:
        one, other = env.render(0, (96, 96)), env.render(1, (96, 96))
    except RuntimeError as error:
        pytest.skip(str(error))
    assert not torch.equal(one, other)
    assert torch.equal(one, env.render(0, (96, 96)))


def test_the_first_state_is_a_function_of_the_seed():
    envs = [twin(prototype(puzzle.SMALL)) for _ in range(2)]
    for env in envs:
        begin(env, 3)
    for name in KEPT:
        assert (getattr(envs[0].data, name) == getattr(envs[1].data, name)).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("env_id", [puzzle.SMALL, puzzle.LARGE])
def test_the_oracle_succeeds(env_id):
    assert all(e.success for e in puzzle.episodes(env_id, 20, seed=0, noise=0.0))


@pytest.mark.parametrize(("name", "numbers"), [("puzzle_3x3", 55), ("puzzle_4x4", 83)])
def test_is_registered_with_its_defaults(name, numbers):
    assert name in TABLE["env"]
    env = find("env", name)(1)
    assert (env.action_shape, env.obs_dim, env.horizon) == ((5, 5), numbers, 100)
