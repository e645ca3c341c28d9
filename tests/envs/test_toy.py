"""Toys: known optima, seeds that decide everything, and an episode that can be taken up in the middle."""

import pytest
import torch
from torch import Tensor

from rlflow.envs.toy import CENTRES, ToyImage, ToyReach
from rlflow.types import tree_leaves

SEEDS = torch.tensor([0, 1, 2, 3, 4, 2**40 + 1])
ENVS = [ToyImage, ToyReach]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def play(env: ToyReach, actions: Tensor) -> Tensor:
    """Rewards (T, B) of the actions (T, B, 2, 2)."""
    return torch.stack([env.step(a).reward for a in actions])


@pytest.mark.parametrize("kind", ENVS)
class TestBoth:
    def test_an_episode_is_a_function_of_its_seed(self, kind):
        order = torch.tensor([5, 3, 0, 1, 2, 4])
        straight, shuffled = kind(6), kind(6)
        a = tree_leaves(straight.reset(SEEDS))
        b = tree_leaves(shuffled.reset(SEEDS[order]))
        assert all(torch.equal(y, x[order]) for x, y in zip(a, b, strict=True))
        action = draw(6, *kind.action_shape)
        assert torch.equal(shuffled.step(action[order]).reward, straight.step(action).reward[order])

    def test_rows_sent_in_pieces_are_the_whole(self, kind):
        whole, pieces = kind(6), kind(6)
        whole.reset(SEEDS), pieces.reset(SEEDS)
        action = draw(6, *kind.action_shape)
        for start in (4, 0, 2):  # in any order
            pieces.send(action[start : start + 2], slice(start, start + 2))
        assert torch.equal(pieces.recv().reward, whole.step(action).reward)

    def test_a_step_says_everything_for_every_row(self, kind):
        env = kind(6)
        env.reset(SEEDS)
        step = env.step(torch.zeros(6, *kind.action_shape))
        assert {len(v) for v in (step.reward, step.terminated, step.truncated, step.valid)} == {6}
        assert bool(step.valid.all())
        assert all(len(v) == 6 for v in tree_leaves(step.obs))


class TestImage:
    def test_the_centre_of_the_prompt_is_the_one_best_answer(self):
        env = ToyImage(4)
        env.reset(torch.arange(4))
        step = env.step(CENTRES)
        assert step.reward.tolist() == [0.0] * 4
        assert bool(step.terminated.all())
        assert not step.truncated.any()
        assert step.final_obs is None
        env.reset(torch.arange(4))
        assert env.step(CENTRES.roll(1, 0)).reward.tolist() == [-2.0] * 4


class TestReach:
    def test_the_state_after_each_command_is_what_is_paid_for(self):
        env = ToyReach(4)
        obs = env.reset(torch.arange(4))
        action = torch.tensor([[[1.0, 0.0], [0.0, 0.5]]]).expand(4, 2, 2)
        step = env.step(action)
        first, second = torch.tensor([0.25, 0.0]), torch.tensor([0.25, 0.125])
        expected = -((first - obs["goal"]).norm(dim=-1) + (second - obs["goal"]).norm(dim=-1)) / 2
        torch.testing.assert_close(step.reward, expected)
        assert torch.equal(step.obs["state"], second.expand(4, 2))

    def test_commands_have_a_top_speed(self):
        fast, full = ToyReach(6), ToyReach(6)
        fast.reset(SEEDS), full.reset(SEEDS)
        action = draw(6, 2, 2).sign()
        assert torch.equal(fast.step(100 * action).reward, full.step(action).reward)

    def test_goals_stand_in_the_four_corners_and_at_many_distances(self):
        goal = ToyReach(64).reset(torch.arange(64))["goal"]
        assert torch.equal(goal.sign(), CENTRES[torch.arange(64) % 4])
        assert 0.6 <= float(goal.abs().min()) < 0.7
        assert 1.3 < float(goal.abs().max()) <= 1.4
        assert len(goal.unique(dim=0)) == 64

    def test_time_runs_out_without_being_an_end(self):
        env = ToyReach(6, horizon=3)
        env.reset(SEEDS)
        for t in range(7):
            before = env.pos + 0.0
            step = env.step(torch.full((6, 2, 2), 0.5))
            over = t % 3 == 2
            assert step.truncated.tolist() == [over] * 6
            assert not step.terminated.any()
            assert torch.allclose(step.final_obs["state"], before + 0.25)  # truly reached
            assert torch.equal(step.obs["state"], torch.zeros(6, 2) if over else step.final_obs["state"])

    def test_the_next_episode_has_the_next_seeds_goal(self):
        env, other = ToyReach(6, horizon=1), ToyReach(6)
        goal = env.reset(SEEDS)["goal"]
        step = env.step(torch.zeros(6, 2, 2))
        assert torch.equal(step.final_obs["goal"], goal)
        assert torch.equal(step.obs["goal"], other.reset(SEEDS + 1)["goal"])

    def test_a_masked_reset_leaves_the_other_rows(self):
        env = ToyReach(6)
        env.reset(SEEDS)
        env.step(draw(6, 2, 2))
        state, goal = env.pos.clone(), env.goal.clone()
        obs = env.reset(SEEDS + 10, torch.arange(6) < 2)
        assert torch.equal(obs["state"][2:], state[2:])
        assert torch.equal(obs["goal"][2:], goal[2:])
        assert not obs["state"][:2].any()
        assert not torch.equal(obs["goal"][:2], goal[:2])
        assert env.elapsed.tolist() == [0, 0, 1, 1, 1, 1]

    def test_observations_handed_out_do_not_change_later(self):
        env = ToyReach(6)
        obs = env.reset(SEEDS)
        kept = {k: v.clone() for k, v in obs.items()}
        env.step(draw(6, 2, 2))
        env.reset(SEEDS + 3)
        assert all(torch.equal(obs[k], v) for k, v in kept.items())

    def test_a_saved_state_goes_on_exactly(self):
        env, other = ToyReach(6), ToyReach(6)
        actions = draw(10, 6, 2, 2)
        env.reset(SEEDS)
        play(env, actions[:3])
        saved = env.state_dict()
        rest = play(env, actions[3:])
        other.load_state_dict(saved)
        assert torch.equal(play(other, actions[3:]), rest)
        other.load_state_dict(saved)  # and is not used up
        assert torch.equal(play(other, actions[3:]), rest)
