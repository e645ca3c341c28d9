"""What is OGBench's puzzles' own: lights of each row, and solutions that are the shortest. All else: test_ogbench.py."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ogbench")

from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators import ogbench_puzzle as puzzle


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
