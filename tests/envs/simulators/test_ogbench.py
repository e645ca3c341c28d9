"""OGBench's tasks: the registered ones step by step, seeds that are all, and oracles that do them; cubes, and how they look."""

from collections.abc import Callable

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("ogbench")

from rlflow.envs.conformance import CHECKS, Make, Subject
from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators import ogbench
from rlflow.envs.simulators import ogbench_puzzle as puzzle
from rlflow.registry import TABLE, find


def cubes(num_envs: int, chunk: int) -> ogbench.CubeSim:
    return ogbench.CubeSim(ogbench.SINGLE, num_envs, threads=1)


def clouds(num_envs: int, chunk: int) -> ogbench.CubeSim:
    """Cubes as clouds, or a skip where nothing can be drawn."""
    try:
        return ogbench.CubeCloudSim(ogbench.SINGLE, num_envs, False, 1, clouds=64, chunk=chunk)
    except RuntimeError as error:
        pytest.skip(str(error))


def lights(num_envs: int, chunk: int) -> ogbench.CubeSim:
    return puzzle.PuzzleSim(puzzle.SMALL, num_envs, threads=1)


def limited(sim: Callable[[int, int], ogbench.CubeSim], limit: int, chunk: int) -> Make:
    """Of `sim` with another time limit."""

    def make(num_envs: int) -> SimEnv:
        found = sim(num_envs, chunk)
        found.horizon = limit
        return SimEnv(found, chunk, 0.9)

    return make


@pytest.mark.parametrize("sim", [cubes, clouds, lights])
@pytest.mark.parametrize("one", CHECKS, ids=lambda f: f.__name__)
def test_conforms(one, sim):
    make, longer, single = (limited(sim, *times) for times in ((6, 2), (20, 2), (6, 1)))
    one(Subject(make, longer, single, num_envs=3, num_steps=7, gamma=0.9))


def test_clouds_show_where_the_cube_is_and_nothing_else_does():
    """Many points on its surface, none inside; they follow it. The numbers beside are the arm's."""
    env = limited(clouds, 20, 1)(3)
    obs = env.reset(torch.arange(3))
    assert {n: tuple(v.shape[1:]) for n, v in obs.items()} == {"cloud": (64, 3), "state": (19,)}
    for row, cloud in enumerate(obs["cloud"]):
        data = env.sim.envs[row].data
        far = (cloud - torch.from_numpy(data.body("object_0").xpos)).abs().amax(1)
        assert int((far < 0.022).sum()) >= 3
        assert float(far.min()) > 0.015
        assert torch.equal(obs["state"][row], torch.from_numpy(env.sim._obs[row, :19]))
    assert obs["cloud"][0].unique(dim=0).shape[0] > 32


def test_chunks_that_end_beyond_the_limit_are_refused():
    with pytest.raises(ValueError, match="chunk must divide 200 steps, got 3"):
        ogbench.cube_single(1, chunk=3, threads=1, clouds=16)


def test_demonstrations_are_the_same_whoever_looks():
    try:
        (cloudy,) = ogbench.episodes(ogbench.SINGLE, 1, 3, 0.7, clouds=32)
    except RuntimeError as error:
        pytest.skip(str(error))
    (plain,) = ogbench.episodes(ogbench.SINGLE, 1, 3, 0.7)
    assert torch.equal(cloudy.action, plain.action)
    assert torch.equal(cloudy.obs["state"], plain.obs[:, :19])
    assert cloudy.obs["cloud"].shape == (len(plain.action), 32, 3)


@pytest.mark.parametrize(
    ("of", "sim", "env_id"),
    [
        (ogbench, ogbench.CubeSim, ogbench.SINGLE),
        (puzzle, puzzle.PuzzleSim, puzzle.SMALL),
        (puzzle, puzzle.PuzzleSim, puzzle.LARGE),
    ],
)
def test_steps_rewards_and_success_are_those_of_the_registered_id(of, sim, env_id):
    """Ours is fed what the oracle did; theirs starts from our state. Buttons are pressed on the way."""
    (episode,) = of.episodes(env_id, 1, seed=5, noise=0.0)
    env = SimEnv(sim(env_id, 1, threads=1))
    obs = env.reset(torch.tensor([5]))
    peer = gymnasium.make(env_id).unwrapped
    ogbench.begin(peer, 5)
    for expected, action, paid in zip(episode.obs, episode.action, episode.reward, strict=True):
        torch.testing.assert_close(obs[0], expected, rtol=0, atol=0)
        step = env.step(action.view(1, 1, 5))
        found, reward, terminated, _, _ = peer.step(action.numpy())
        np.testing.assert_allclose(step.final_obs[0].numpy(), found.astype(np.float32), rtol=0, atol=0)
        assert (float(step.reward[0]), bool(step.terminated[0])) == (reward, terminated)
        assert float(paid) == reward
        obs = step.obs
    assert (episode.success, episode.terminated, episode.truncated) == (True, True, False)
    assert bool(step.terminated[0])
    assert float(step.info["success"][0]) == 1
    if of is puzzle:
        assert len(set(episode.reward.tolist())) > 2, "some were right on the way"
    else:  # -1 a step, 0 when all cubes are in place
        assert float(step.info["episode_return"][0]) == 1 - len(episode.action)


@pytest.mark.parametrize("env_id", [ogbench.SINGLE, puzzle.SMALL])
def test_the_first_state_is_a_function_of_the_seed(env_id):
    """OGBench's own reset takes random steps that no seed reaches."""
    envs = [ogbench.twin(ogbench.prototype(env_id)) for _ in range(2)]
    for env in envs:
        ogbench.begin(env, 3)
    for name in ogbench.KEPT:
        assert (getattr(envs[0].data, name) == getattr(envs[1].data, name)).all(), name


def test_an_episode_that_runs_out_of_time_is_cut_off_not_ended():
    env = ogbench.twin(ogbench.prototype(ogbench.SINGLE))
    episode = ogbench.demonstration(env, 3, seed=0, noise=0.0)
    assert (len(episode.action), episode.terminated, episode.truncated, episode.success) == (3, False, True, False)
    assert episode.reward.tolist() == [-1.0] * 3


def test_copies_share_what_never_changes_and_move_alone():
    """A model is 60 MB and each environment has two: a hundred rows would fill the memory."""
    one, other = (ogbench.twin(ogbench.prototype(ogbench.SINGLE)) for _ in range(2))
    assert one.model is other.model
    assert one._ik._model is other._ik._model
    assert one._ik._data is not other._ik._data
    assert one._ik._jac is not other._ik._jac
    before = [ogbench.begin(env, 3) for env in (one, other)]
    frozen = {name: getattr(other.data, name).copy() for name in ogbench.KEPT}
    moved = one.step(np.ones(5))[0]
    assert not np.allclose(moved, before[0])
    assert all((getattr(other.data, name) == value).all() for name, value in frozen.items())


def test_sparse_pays_one_for_success():
    actions = next(ogbench.episodes(ogbench.SINGLE, 1, seed=2, noise=0.0)).action
    env = ogbench.cube_single(1, chunk=1, sparse=True, threads=1)
    env.reset(torch.tensor([2]))
    rewards = [float(env.step(a.view(1, 1, 5)).reward[0]) for a in actions]
    assert rewards == [0.0] * (len(actions) - 1) + [1.0]


def test_threads_change_nothing():
    actions, found = torch.rand(2, 3, 3, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1, []
    for threads in (1, 2):
        env = ogbench.cube_single(3, chunk=3, threads=threads)
        env.reset(torch.arange(3))
        found.append(torch.stack([env.step(a).obs for a in actions]))
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "env_id", "least"),
    [
        (ogbench, ogbench.SINGLE, 19),
        (ogbench, ogbench.DOUBLE, 18),
        (puzzle, puzzle.SMALL, 20),
        (puzzle, puzzle.LARGE, 20),
    ],
)
def test_the_oracle_succeeds(of, env_id, least):
    assert sum(e.success for e in of.episodes(env_id, 20, seed=0, noise=0.0)) >= least


def test_noise_and_seed_make_another_episode_and_leave_numpy_alone():
    before = np.random.get_state()[1].copy()
    played = [
        next(ogbench.episodes(ogbench.SINGLE, 1, s, n)).action for s, n in ((0, 0.0), (0, 0.0), (0, 0.2), (1, 0.0))
    ]
    assert (np.random.get_state()[1] == before).all()
    assert torch.equal(played[0], played[1])
    assert not torch.equal(played[0][:20], played[2][:20])
    assert not torch.equal(played[0][:20], played[3][:20])
    assert float(played[2].abs().max()) <= 1


def test_pictures_show_the_cube_move():
    env = ogbench.cube_single(2, threads=1)
    env.reset(torch.arange(2))
    try:
        one, other = env.render(0, (96, 96)), env.render(1, (96, 96))
    except RuntimeError as error:
        pytest.skip(str(error))
    assert one.shape == (96, 96, 3)
    assert not torch.equal(one, other)
    assert torch.equal(one, env.render(0, (96, 96)))


@pytest.mark.parametrize(
    ("name", "numbers", "limit"),
    [("cube_single", 28, 40), ("cube_double", 37, 100), ("puzzle_3x3", 55, 100), ("puzzle_4x4", 83, 100)],
)
def test_is_registered_with_its_defaults(name, numbers, limit):
    assert name in TABLE["env"]
    env = find("env", name)(1)
    assert (env.action_shape, env.obs_dim, env.horizon) == ((5, 5), numbers, limit)
