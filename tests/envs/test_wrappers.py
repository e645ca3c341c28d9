"""Wrappers: the scale is the std of what was returned, frames stay inside their episode, scores mask and never count as 0."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlflow.envs.simulators.gym import gym
from rlflow.envs.simulators.toy import ToyMDP, ToyReach, ToyRoutes
from rlflow.envs.wrappers import Decoded, FrameStack, RewardScaling, RewardWrapper, _beside
from rlflow.rewards.base import Reward, RewardSet


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestRewardScaling:
    def test_divides_by_the_std_of_all_discounted_returns_so_far(self):
        env, bare = RewardScaling(ToyRoutes(16), gamma=0.9, clip=1e9), ToyRoutes(16)
        env.reset(torch.arange(16)), bare.reset(torch.arange(16))
        running, seen = np.zeros(16), []
        for t in range(30):
            action = draw(16, 2, 2, seed=t)
            step, raw = env.step(action), bare.step(action)
            running = raw.reward.double().numpy() + 0.9 ** raw.num_steps.numpy() * running
            seen.append(running.copy())
            running[raw.ended.numpy()] = 0
            std = np.stack(seen).std()
            np.testing.assert_allclose(step.reward.numpy(), raw.reward.numpy() / std, rtol=1e-4)

    def test_leaves_the_episodes_return_in_its_own_units(self):
        env, bare = RewardScaling(ToyMDP(8)), ToyMDP(8)
        env.reset(torch.arange(8)), bare.reset(torch.arange(8))
        for t in range(8):
            step, raw = env.step(draw(8, 1, 1, seed=t)), bare.step(draw(8, 1, 1, seed=t))
            for name in ("episode_return", "episode_length"):
                torch.testing.assert_close(step.info[name], raw.info[name], equal_nan=True, rtol=0, atol=0)

    def test_clips(self):
        env = RewardScaling(ToyMDP(64, horizon=3), clip=0.5)
        env.reset(torch.arange(64))
        reward = torch.cat([env.step(draw(64, 1, 1, seed=t)).reward for t in range(20)])
        assert float(reward.abs().max()) == 0.5

    def test_a_constant_reward_is_left_alone(self):
        env = RewardScaling(ToyMDP(4), gamma=1.0)
        env.reset(torch.arange(4))
        reward = env.step(torch.full((4, 1, 1), -1.0)).reward
        torch.testing.assert_close(reward, torch.full((4,), -0.05))

    def test_a_row_without_a_score_is_no_part_of_the_scale(self):
        def some(reward: Tensor) -> list[float | None]:
            return [None if i == 2 else float(r) for i, r in enumerate(reward)]

        env = RewardScaling(RewardWrapper(ToyRoutes(4), RewardSet([Reward("some", some)])), clip=1e9)
        other = RewardScaling(ToyRoutes(4), clip=1e9)
        env.reset(torch.arange(4)), other.reset(torch.arange(4))
        step = env.step(draw(4, 2, 2))
        assert step.reward.isnan().tolist() == [False, False, True, False]
        assert float(env.moments[0]) == 3
        other.step(draw(4, 2, 2))
        assert float(other.moments[0]) == 4

    def test_two_processes_share_one_scale(self, ranks):
        def rewards(rows: slice) -> Tensor:
            env = RewardScaling(ToyRoutes(rows.stop - rows.start))
            env.reset(torch.arange(8)[rows])
            return torch.stack([env.step(draw(8, 2, 2, seed=t)[rows]).reward for t in range(12)])

        halves = ranks(2, lambda rank: rewards(slice(4 * rank, 4 * rank + 4)))
        torch.testing.assert_close(torch.cat(halves, 1), rewards(slice(0, 8)), rtol=1e-5, atol=1e-7)


class TestFrameStack:
    def test_holds_the_last_observations_of_its_own_episode(self):
        """Rows end at different steps; every stacked frame is looked up in the history of the bare environment."""
        env, bare = FrameStack(ToyRoutes(32), 3), ToyRoutes(32)
        first = env.reset(torch.arange(32))
        history = [[obs] * 3 for obs in bare.reset(torch.arange(32))]
        assert torch.equal(first, torch.stack([torch.cat(h) for h in history]))
        for t in range(20):
            action = 0.7 * draw(32, 2, 2, seed=t)
            step, raw = env.step(action), bare.step(action)
            reached = [[*h[1:], obs] for h, obs in zip(history, raw.final_obs, strict=True)]
            assert torch.equal(step.final_obs, torch.stack([torch.cat(h) for h in reached]))
            anew = zip(reached, raw.obs, raw.ended, strict=True)
            history = [[obs] * 3 if ended else h for h, obs, ended in anew]
            assert torch.equal(step.obs, torch.stack([torch.cat(h) for h in history]))

    def test_stacks_every_part_of_a_dictionary(self):
        env = FrameStack(ToyReach(2), 4)
        assert {k: tuple(v.shape) for k, v in env.reset(torch.arange(2)).items()} == {"goal": (2, 8), "state": (2, 8)}
        assert env.obs_dim == 16

    @pytest.mark.parametrize(("shape", "axis"), [((6, 6, 3), 2), ((3, 6, 6), 0)])
    def test_stacks_pictures_along_their_channels(self, shape, axis):
        """Wherever those stand; each frame is found again in its place."""
        frames = [torch.full((2, *shape), i) for i in range(3)]
        found = _beside([{"pixels": frame} for frame in frames])["pixels"]
        assert found.shape[1 + axis] == 9
        assert torch.equal(torch.cat(found.split(3, 1 + axis)), torch.cat(frames))

    def test_needs_a_frame(self):
        with pytest.raises(ValueError, match="num >= 1"):
            FrameStack(ToyReach(2), 0)


class TestRewardWrapper:
    def env(self, *rewards: Any, **settings: Any) -> RewardWrapper:
        env = RewardWrapper(ToyReach(6, 2), RewardSet([Reward(r.__name__, r) for r in rewards], **settings))
        env.reset(torch.arange(6))
        return env

    def test_functions_see_before_and_after_also_where_an_episode_ended(self):
        seen: dict[str, Any] = {}

        def moved(obs: Any, action: Tensor, next_obs: Any, reward: Tensor, episode_length: Tensor) -> Tensor:
            seen.update(action=action, reward=reward, length=episode_length)
            assert torch.equal(obs["goal"], next_obs["goal"])  # never the next episode's
            return (next_obs["state"] - obs["state"]).norm(dim=-1)

        env, bare = self.env(moved), ToyReach(6, 2)
        bare.reset(torch.arange(6))
        for t in range(4):
            action = draw(6, 2, 2, seed=t)
            step, raw = env.step(action), bare.step(action)
            way = 0.25 * action.clamp(-1, 1).sum(1)
            torch.testing.assert_close(step.reward, way.norm(dim=-1))
            assert torch.equal(seen["action"], action)
            assert torch.equal(seen["reward"], raw.reward)
            assert torch.equal(step.truncated, raw.truncated)
            assert bool(seen["length"].isfinite().all()) == (t % 2 == 1)

    def test_no_score_masks_the_row_and_is_not_zero(self):
        def odd(next_obs: Any) -> list[float | None]:
            return [1.0 if i % 2 else None for i in range(6)]

        step = self.env(odd).step(draw(6, 2, 2))
        assert step.valid.tolist() == [False, True] * 3
        assert step.reward.isnan().tolist() == [True, False] * 3
        assert step.reward_parts["odd"].isnan().tolist() == [True, False] * 3

    def test_several_are_weighed_or_left_for_the_advantage(self):
        def one(reward: Tensor) -> Tensor:
            return torch.ones(6)

        def two(reward: Tensor) -> Tensor:
            return 2 * torch.ones(6)

        assert self.env(one, two).step(draw(6, 2, 2)).reward.tolist() == [3.0] * 6
        assert self.env(one, two).reward_weights == {}
        assert self.env(one, two, normalize="advantage").reward_weights == {"one": 1.0, "two": 1.0}

    def test_an_unknown_column_is_named_with_the_nearest(self):
        def wrong(next_ob: Any) -> Tensor:
            return next_ob

        with pytest.raises(ValueError, match="'next_ob'.*did you mean 'next_obs'"):
            self.env(wrong).step(draw(6, 2, 2))

    def test_reports_the_rewards_metrics(self):
        def one(reward: Tensor) -> Tensor:
            return torch.ones(6)

        env = self.env(one)
        env.step(draw(6, 2, 2))
        assert env.metrics()["reward/one/mean"] == 1


class TestDecoded:
    """Pendulum's torque is in [-2, 2]: a sample is a padded chunk of four pairs, of which two are carried out."""

    def made(self, chunk: int = 2) -> Decoded:
        inner = gym(3, "Pendulum-v1", chunk=chunk)
        return Decoded(inner, lambda x: 0.5 + 1.5 * x[..., :1], (4, 2))

    def test_actions_are_in_the_environments_own_units(self):
        env, seen = self.made(), []
        env.reset(torch.arange(3))
        row = env.unwrapped.sim.envs[1]
        row.step = lambda action, step=row.step: (seen.append(float(action[0])), step(action))[1]
        x = torch.tensor([[[0.1, 9.0], [-0.7, 9.0], [3.0, 9.0], [3.0, 9.0]]]).expand(3, 4, 2)
        assert env.step(x).num_steps.tolist() == [2, 2, 2]
        assert seen == pytest.approx([0.65, -0.55])
        env.step(torch.full((3, 4, 2), 5.0))
        assert seen[2:] == [2.0, 2.0], "the environment's bounds hold"

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match="plans 4 actions, the environment carries out 6.*env.settings.chunk=4 or"):
            self.made(chunk=6)
        with pytest.raises(ValueError, match=r"makes actions \(4, 2\), the environment takes \(1,\)"):
            Decoded(gym(1, "Pendulum-v1"), lambda x: x, (4, 2))
