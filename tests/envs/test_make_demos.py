"""scripts/make_demos.py: stable-baselines3 sees our environment whole, and the expert kept is the policy it trained."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")
pytest.importorskip("mujoco")

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecNormalize

from rlflow.envs.experts import GaussianExpert


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(
        "script_make_demos", Path(__file__).parents[2] / "scripts/make_demos.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_ended_rows_tell_their_return_and_what_they_reached(script):
    env = script.Vectorised("hopper", 3, seed=0)
    env.reset()
    earned, rng, seen = np.zeros(3), np.random.default_rng(0), 0
    for _ in range(200):
        obs, reward, ended, infos = env.step(rng.uniform(-1, 1, (3, 3)).astype(np.float32))
        earned += reward
        for row in range(3):
            assert bool(infos[row]) is bool(ended[row])
        for row in np.flatnonzero(ended):
            assert infos[row]["episode"]["r"] == pytest.approx(earned[row], rel=1e-5)
            assert not infos[row]["TimeLimit.truncated"]
            assert abs(infos[row]["terminal_observation"] - obs[row]).max() > 0.01
            earned[row], seen = 0, seen + 1
    assert seen > 5


def test_the_expert_is_the_policy_that_was_trained(script):
    env = VecNormalize(script.Vectorised("hopper", 4, seed=0))
    model = PPO(
        "MlpPolicy", env, n_steps=16, batch_size=64, policy_kwargs={"net_arch": [64, 64], "log_std_init": -30.0}
    )
    model.learn(64)
    expert = GaussianExpert(11, 3)
    expert.load_state_dict(script.expert_weights(model.policy.state_dict(), env))
    obs = 2 * torch.randn(20, 11)
    expected, _ = model.predict(env.normalize_obs(obs.numpy()), deterministic=True)
    torch.testing.assert_close(expert(obs, torch.Generator()), torch.from_numpy(expected), atol=1e-4, rtol=0)


def test_every_expert_has_a_recipe(script):
    assert set(script.RECIPES) == set(script.EXPERTS)
