"""scripts/make_demos.py: the expert kept is the policy that stable-baselines3 trained."""

import pytest
import torch

pytest.importorskip("stable_baselines3")
pytest.importorskip("mujoco")

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecNormalize

from rlflow.envs.demos.demonstrators import DEMONSTRATORS, Expert
from rlflow.envs.demos.experts import GaussianExpert
from rlflow.envs.sb3 import Vectorised
from rlflow.envs.simulators.mujoco import hopper


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("make_demos")


def test_the_expert_is_the_policy_that_was_trained(script):
    env = VecNormalize(Vectorised(hopper(4, chunk=1)))
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
    assert set(script.RECIPES) == {who.env for who in DEMONSTRATORS.values() if isinstance(who, Expert)}
