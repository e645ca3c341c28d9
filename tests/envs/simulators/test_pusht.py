"""PushT through the Gymnasium adapter: what is observed, success, pictures, and the suite for environments."""

import pytest
import torch

pytest.importorskip("gym_pusht")

from rlflow.envs.conformance import CHECKS, Subject
from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators.gym import registered
from rlflow.envs.simulators.pusht import pusht, pusht_pixels


def limited(limit: int, chunk: int):
    def make(num_envs: int) -> SimEnv:
        return SimEnv(registered("gym_pusht/PushT-v0", num_envs, limit, success="is_success"), chunk, 0.9)

    return make


SUBJECT = Subject(limited(6, 2), limited(20, 2), limited(6, 1), num_envs=3, num_steps=8, gamma=0.9)


@pytest.mark.parametrize("one", CHECKS, ids=lambda f: f.__name__)
def test_conforms(one):
    one(SUBJECT)


def test_pixels_stay_bytes_and_show_the_disc():
    env = pusht_pixels(2)
    obs = env.reset(torch.arange(2))
    assert obs["pixels"].shape == (2, 96, 96, 3)
    assert obs["pixels"].dtype == torch.uint8
    assert obs["agent_pos"].shape == (2, 2)
    for row in range(2):  # the disc is blue
        x, y = (obs["agent_pos"][row] * 96 / 512).long().tolist()
        red, _, blue = obs["pixels"][row, y, x].tolist()
        assert blue > red + 60
    picture = env.render(1, (64, 48))
    assert picture.shape == (64, 48, 3)
    assert picture.dtype == torch.uint8


def test_the_picture_of_a_chunk_is_that_of_its_end():
    """Though it is drawn once a chunk, at the time limit in mid-chunk too."""
    env = pusht_pixels(2, chunk=7, size=48)
    env.reset(torch.arange(2))
    for _ in range(43):  # 301 steps, one more than an episode has
        step = env.step(torch.rand(2, 7, 2) * 2 - 1)
        shown = step.final_obs if bool(step.ended.any()) else step.obs
        for row in range(2):
            inner = env.sim.envs[row].unwrapped
            if not bool(step.ended[row]):
                inner.obs_type = "pixels"
                assert shown["pixels"].shape == (2, 48, 48, 3)
                assert torch.equal(shown["pixels"][row], torch.from_numpy(inner.get_obs()))
                inner.obs_type = "state"
    assert bool(step.truncated.all())
    assert not torch.equal(step.final_obs["pixels"], step.obs["pixels"])


def test_covering_the_outline_is_success_and_the_end():
    env = pusht(1, chunk=1)
    env.reset(torch.zeros(1).long())
    inner = env.sim.envs[0].unwrapped
    inner.agent.position = (40.0, 40.0)
    inner.block.angle = float(inner.goal_pose[2])  # turns about the centre of mass, hence before the place
    inner.block.position = inner.goal_pose[:2].tolist()
    stay = torch.tensor([[[40.0, 40.0]]]) / 256 - 1
    step = env.step(stay)
    assert bool(step.terminated[0])
    assert float(step.info["success"][0]) == 1
    assert float(step.reward[0]) == pytest.approx(1)
