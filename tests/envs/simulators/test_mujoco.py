"""Locomotion equals Gymnasium's own environments, step by step; noise, threads and shapes besides."""

import inspect

import gymnasium
import numpy as np
import pytest
import torch

from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators import mujoco
from rlflow.registry import TABLE, find

ALL = (mujoco.HOPPER, mujoco.WALKER2D, mujoco.HALFCHEETAH, mujoco.INVERTED_PENDULUM, mujoco.ANT, mujoco.HUMANOID)
TASKS = {t.name: t for t in ALL}
ROWS, STEPS, LIMIT = 3, 340, 70


class Peers:
    """One environment of Gymnasium per row of ours, whose start states ours takes over."""

    def __init__(self, task: mujoco.Task):
        self.env = SimEnv(mujoco.MujocoSim(task, ROWS, threads=2, horizon=LIMIT))
        self.peers = [gymnasium.make(task.name, max_episode_steps=LIMIT) for _ in range(ROWS)]
        self.high = self.peers[0].action_space.high
        self.env.reset(torch.arange(ROWS))
        self.starts = np.stack([self.start(row, seed=row) for row in range(ROWS)])

    def start(self, row: int, seed: int | None = None) -> np.ndarray:
        """Reset a peer and put our row into its state; its first observation."""
        obs, _ = self.peers[row].reset(seed=seed)
        data = self.peers[row].unwrapped.data
        self.env.sim.place(np.array([row]), data.qpos, data.qvel)
        self.near(self.env.sim._obs[row], obs)
        return obs

    @staticmethod
    def near(ours: np.ndarray, theirs: np.ndarray) -> None:
        """Equal but for the float32 of our observations."""
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)

    def compare(self, rng: np.random.Generator) -> tuple[int, int]:
        """One step of everyone; (terminated, truncated) rows."""
        action = rng.uniform(-1.2, 1.2, (ROWS, len(self.high))).astype(np.float32)
        step = self.env.step(torch.from_numpy(action).unsqueeze(1))
        for row, peer in enumerate(self.peers):
            obs, reward, terminated, truncated, _ = peer.step(np.clip(action[row], -1, 1) * self.high)
            self.near(step.final_obs[row].numpy(), obs)
            assert float(step.reward[row]) == pytest.approx(reward, rel=1e-5, abs=1e-5)
            assert bool(step.terminated[row]) == terminated
            assert bool(step.truncated[row]) == (truncated and not terminated)
            if terminated or truncated:
                self.start(row)
        return int(step.terminated.sum()), int(step.truncated.sum())


@pytest.mark.parametrize("name", TASKS)
def test_equals_gymnasium_over_a_thousand_random_steps(name):
    both, rng = Peers(TASKS[name]), np.random.default_rng(0)
    terminated, truncated = np.sum([both.compare(rng) for _ in range(STEPS)], axis=0)
    assert truncated > 0 or name not in ("HalfCheetah-v5", "Ant-v5")  # the others fall long before
    assert (terminated > 0) == (name != "HalfCheetah-v5")


@pytest.mark.parametrize("name", TASKS)
def test_shapes_and_bounds_are_gymnasiums(name):
    env, peer = SimEnv(mujoco.MujocoSim(TASKS[name], 2)), gymnasium.make(name)
    assert tuple(env.obs_spec.shape) == peer.observation_space.shape
    assert env.obs_dim == peer.observation_space.shape[0]
    assert env.action_shape == (1, *peer.action_space.shape)
    assert env.horizon == peer.spec.max_episode_steps
    np.testing.assert_array_equal(env.sim.high.numpy(), peer.action_space.high)
    np.testing.assert_array_equal(env.sim.low.numpy(), peer.action_space.low)


@pytest.mark.parametrize("name", TASKS)
def test_numbers_are_gymnasiums_defaults(name):
    """Those that random steps may not reach, like the largest price of contacts, included."""
    ours, kind = TASKS[name], type(gymnasium.make(name).unwrapped)
    theirs = {n: p.default for n, p in inspect.signature(kind.__init__).parameters.items()}
    named = {
        "xml_file": ours.xml,
        "frame_skip": ours.frame_skip,
        "ctrl_cost_weight": ours.control,
        "reset_noise_scale": ours.noise,
        "forward_reward_weight": ours.forward,
        "healthy_reward": ours.alive,
        "contact_cost_weight": ours.contact,
        "contact_cost_range": (-np.inf, ours.max_contact),
        "contact_force_range": (-ours.clip_contact, ours.clip_contact),
        "healthy_state_range": (-ours.others[1], ours.others[1]),
    }
    shared = named.keys() & theirs.keys()
    assert len(shared) >= (3 if name == "InvertedPendulum-v5" else 5)
    assert {n: named[n] for n in shared} == {n: theirs[n] for n in shared}


@pytest.mark.parametrize("name", TASKS)
def test_start_states_are_spread_as_gymnasiums(name):
    """Same range or std, coordinate by coordinate, over 500 seeds."""
    sim = mujoco.MujocoSim(TASKS[name], 500)
    sim.reset(torch.arange(500), torch.ones(500, dtype=torch.bool))
    peer, states = gymnasium.make(name).unwrapped, []
    for seed in range(200):
        peer.reset(seed=seed)
        states.append(np.concatenate([peer.data.qpos, peer.data.qvel]))
    theirs, ours = np.stack(states), sim._state
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.3 * theirs.std(0).max())
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.25)
    reach = [np.abs(s - s.mean(0)).max(0) for s in (ours, theirs)]  # tells a uniform from a normal distribution
    np.testing.assert_allclose(reach[0] / ours.std(0) > 2, reach[1] / theirs.std(0) > 2)


def test_loading_a_model_leaves_no_log_file(tmp_path, monkeypatch, capfd):
    """MuJoCo writes warnings to MUJOCO_LOG.TXT where it stands; one model of Gymnasium's has a deprecated setting."""
    monkeypatch.chdir(tmp_path)
    mujoco.HALFCHEETAH.load()
    assert not list(tmp_path.iterdir())
    assert "deprecated" not in capfd.readouterr().err


def test_threads_change_nothing():
    actions = torch.rand(30, 6, 2, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = []
    for threads in (1, 2):
        env = mujoco.ant(6, chunk=2, threads=threads)
        env.reset(torch.arange(6))
        found.append(torch.stack([torch.cat([s.obs, s.reward[:, None]], 1) for s in map(env.step, actions)]))
    assert torch.equal(*found)


def test_a_restored_state_needs_its_warm_start():
    """The solver begins at the last accelerations: without them the trajectory is another one."""
    env = mujoco.hopper(4, chunk=1)
    env.reset(torch.arange(4))
    actions = torch.rand(12, 4, 1, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for action in actions[:6]:
        env.step(action)
    state = env.state_dict()
    exact = [env.step(a).obs for a in actions[6:]]
    env.load_state_dict(state)
    assert all(torch.equal(env.step(a).obs, obs) for a, obs in zip(actions[6:], exact, strict=True))
    physics = []
    for warm in (True, False):
        env.load_state_dict(state)
        env.sim.batch.bind("qacc_warmstart")[:] *= warm
        for action in actions[6:]:
            env.step(action)
        physics.append(env.sim.state_dict()["physics"])
    assert not torch.equal(*physics)


@pytest.mark.parametrize("name", ["hopper", "walker2d", "halfcheetah", "inverted_pendulum", "ant", "humanoid"])
def test_is_registered_with_its_defaults(name):
    env = find("env", name)(2)
    assert env.action_shape[0] == 4
    assert env.gamma == 0.99
    assert name in TABLE["env"]
    assert f"{env.sim.task.name.removesuffix('-v5').lower()}" == name.replace("_", "")
