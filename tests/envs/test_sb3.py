"""stable-baselines3 sees our simulators whole: Gymnasium's returns, what ended rows reached, and ends by time."""

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")
pytest.importorskip("mujoco")

from stable_baselines3 import PPO

from rlflow.envs.sb3 import Vectorised
from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators import mujoco

ROWS = 3


def actions(rng, num):
    return rng.uniform(-1, 1, (ROWS, num)).astype(np.float32)


def test_ended_rows_tell_their_return_and_what_they_reached():
    env = Vectorised(mujoco.hopper(ROWS, chunk=1))
    env.reset()
    earned, rng, seen = np.zeros(ROWS), np.random.default_rng(0), 0
    for _ in range(200):
        obs, reward, ended, infos = env.step(actions(rng, 3))
        earned += reward
        for row in range(ROWS):
            assert bool(infos[row]) is bool(ended[row])
        for row in np.flatnonzero(ended):
            assert infos[row]["episode"]["r"] == pytest.approx(earned[row], rel=1e-5)
            assert not infos[row]["TimeLimit.truncated"]
            assert abs(infos[row]["terminal_observation"] - obs[row]).max() > 0.01
            earned[row], seen = 0, seen + 1
    assert seen > 5


@pytest.mark.parametrize(("task", "limit"), [(mujoco.HOPPER, 1000), (mujoco.HALFCHEETAH, 40)])
def test_an_episode_is_gymnasiums(task, limit):
    """From the same start state: return, length, last observation, and whether time ended it."""
    env = Vectorised(SimEnv(mujoco.MujocoSim(task, ROWS, threads=1, horizon=limit)), seed=5)
    env.reset()
    peer, rng = gymnasium.make(task.name, max_episode_steps=limit), np.random.default_rng(0)
    peer.reset()
    peer.unwrapped.set_state(env.env.sim._qpos[0].copy(), env.env.sim._qvel[0].copy())
    earned, ended, length = 0.0, np.zeros(ROWS, bool), 0
    while not ended[0]:
        action = actions(rng, len(env.env.sim.low))
        _, _, ended, infos = env.step(action)
        reached, reward, terminated, truncated, _ = peer.step(action[0])
        earned, length = earned + reward, length + 1
        assert bool(ended[0]) == (terminated or truncated)
    assert infos[0]["episode"] == {"r": pytest.approx(earned, rel=1e-4), "l": length}
    assert infos[0]["TimeLimit.truncated"] is (truncated and not terminated) is (task is mujoco.HALFCHEETAH)
    np.testing.assert_allclose(infos[0]["terminal_observation"], reached, rtol=1e-5, atol=1e-5)


def test_time_is_no_end_to_the_learner():
    """PPO adds gamma V(what was reached) to the reward of a truncated row, and to no other."""
    env = Vectorised(SimEnv(mujoco.MujocoSim(mujoco.HALFCHEETAH, ROWS, threads=1, horizon=4)))
    model = PPO("MlpPolicy", env, n_steps=6, batch_size=18, gamma=0.9, device="cpu")
    rewards, values, step = [], [], env.step_wait

    def seen():
        obs, reward, ended, infos = step()
        rewards.append(reward.copy())
        reached = np.stack([i.get("terminal_observation", o) for i, o in zip(infos, obs, strict=True)])
        with torch.no_grad():
            values.append(ended * model.policy.predict_values(torch.from_numpy(reached))[:, 0].numpy())
        return obs, reward, ended, infos

    env.step_wait = seen
    model.learn(0)  # sets up, collects nothing
    model.collect_rollouts(env, model._init_callback(None), model.rollout_buffer, 6)
    assert np.abs(values[3]).min() > 1e-4
    np.testing.assert_allclose(model.rollout_buffer.rewards, np.stack(rewards) + 0.9 * np.stack(values), atol=1e-5)


def test_first_episodes_are_those_of_the_seeds():
    starts = [Vectorised(mujoco.hopper(ROWS, chunk=1), seed).reset() for seed in (7, 8)]
    np.testing.assert_array_equal(starts[0][1:], starts[1][:-1])
    assert abs(starts[0][0] - starts[0][1]).max() > 1e-4


def test_chunks_are_refused():
    with pytest.raises(ValueError, match="chunk=1"):
        Vectorised(mujoco.hopper(ROWS, chunk=4))
