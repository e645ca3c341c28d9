"""EnvPool through the adapter of vector environments that reset on the next step."""

import pytest
import torch

pytest.importorskip("envpool")

from rlflow.envs.conformance import CHECKS, Subject
from rlflow.envs.simulators.envpool import envpool

SUBJECT = Subject(
    lambda num_envs: envpool(num_envs, "Hopper-v5", threads=1, options={"max_episode_steps": 9}),
    longer=lambda num_envs: envpool(num_envs, "Hopper-v5", threads=1, options={"max_episode_steps": 50}),
    num_envs=3,
    num_steps=12,
    masked_reset=False,
)


@pytest.mark.parametrize("one", CHECKS, ids=lambda f: f.__name__)
def test_conforms(one):
    one(SUBJECT)


def test_a_start_is_a_function_of_its_seed_and_the_dynamics_are_gymnasiums():
    """Every row's steps are those of Gymnasium's environment set to the row's first state."""
    gymnasium = pytest.importorskip("gymnasium")
    env = envpool(2, "Hopper-v5", threads=1, options={"reset_noise_scale": 0.0})
    obs = env.reset(torch.tensor([3, 11]))
    peer = gymnasium.make("Hopper-v5", reset_noise_scale=0.0)
    first, _ = peer.reset()
    torch.testing.assert_close(obs[1], torch.from_numpy(first).float())
    for action in torch.rand(10, 2, *env.action_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1:
        step = env.step(action)
        seen, reward, *_ = peer.step(action[1, 0].numpy())
        torch.testing.assert_close(step.obs[1], torch.from_numpy(seen).float(), rtol=1e-4, atol=1e-4)
        assert float(step.reward[1]) == pytest.approx(reward, rel=1e-4)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="EnvPool has no environment 'Hopper-v0'"):
        envpool(1, "Hopper-v0")
