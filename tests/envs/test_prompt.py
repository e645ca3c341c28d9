"""PromptEnv: every image judged against its own prompt, failures that mask and nothing else, and work that overlaps."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlflow.envs.prompt import PromptEnv
from rlflow.envs.prompts import Prompts
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import AllButLast
from rlflow.models.mlp import MLPField
from rlflow.rewards.base import Reward, RewardSet
from rlflow.rewards.colour import brightness
from rlflow.rewards.judges import base_distance, diversity
from rlflow.rl.advantages import GroupAdvantage
from rlflow.rl.collector import Collector, permute_rewards
from rlflow.rl.groups import Groups
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.types import Chain

PROMPTS = Prompts(tuple({"prompt": f"word {i}", "value": i} for i in (3, 1, 4, 1, 5, 9, 2, 6)))
SHAPE = (3, 4, 4)


def tokenize(captions: list[str]) -> Tensor:
    """One number per caption, four times."""
    return torch.tensor([float(c.split()[1]) for c in captions])[:, None].repeat(1, 4)


def value_error(images: Tensor, prompt: list[str], value: list[int]) -> Tensor:
    """0 where the picture shows its prompt's number and the columns agree, else negative."""
    shown, asked = images.mean((1, 2, 3)), torch.tensor([float(v) for v in value])
    assert [int(p.split()[1]) for p in prompt] == list(value)
    return -(shown - asked).abs()


def make_env(*rewards: Reward | Callable[..., Any], num_envs: int = 8, seed: int = 0, **kwargs: Any) -> PromptEnv:
    found = [r if isinstance(r, Reward) else Reward(r.__name__, r) for r in rewards or (value_error,)]
    return PromptEnv(PROMPTS, RewardSet(found, **kwargs), num_envs, SHAPE, tokenize, lambda x: x, seed)


def painted(obs: Tensor) -> Tensor:
    """The right picture of every row."""
    return obs[:, :1, None, None].expand(-1, *SHAPE).contiguous()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


class TestPrompts:
    def test_a_prompt_is_the_serial_numbers(self):
        one, two = make_env(), make_env()
        serial = torch.tensor([0, 0, 5, 5, 8, 8, 15, 15])
        obs = one.reset(serial)
        assert torch.equal(obs, two.reset(serial))
        close(obs[::2], obs[1::2])
        assert not torch.equal(obs, make_env(seed=1).reset(serial))

    def test_an_epoch_shows_each_prompt_once_duplicates_included(self):
        obs = make_env().reset(torch.arange(8))
        assert sorted(obs[:, 0].tolist()) == [1, 1, 2, 3, 4, 5, 6, 9]

    def test_part_of_the_rows_cannot_be_reset(self):
        with pytest.raises(ValueError, match="a prompt is a whole episode"):
            make_env().reset(torch.arange(8), torch.arange(8) < 4)

    def test_a_column_no_prompt_has_is_an_error_before_anything_runs(self):
        with pytest.raises(ValueError, match=r"reads column 'valve'.*did you mean 'value'"):
            make_env(Reward("bad", lambda valve: valve))

    @pytest.mark.parametrize("name", ["images", "group"])
    def test_a_prompt_column_does_not_hide_one_of_ours(self, name):
        prompts = Prompts(({"prompt": "word 1", name: "x"},))
        with pytest.raises(ValueError, match=rf"prompt columns \['{name}'\].*rename"):
            PromptEnv(prompts, RewardSet([Reward("r", brightness)]), 8, SHAPE, tokenize, lambda x: x)

    def test_a_distance_to_the_base_is_for_evaluation(self):
        with pytest.raises(ValueError, match=r"'far' compares with .* which only evaluation makes.*eval\.metrics"):
            make_env(value_error, Reward("far", base_distance, 0.0))


class TestGroups:
    def test_a_row_brings_the_serial_number_of_its_group(self):
        env = make_env(Reward("group", lambda group: group))
        serial = torch.tensor([3, 3, 9, 9, 10, 10, 2, 2])
        env.reset(serial)
        for start in (0, 4):
            env.send(torch.zeros(4, *SHAPE), slice(start, start + 4))
        assert env.recv().reward.tolist() == serial.tolist()

    @pytest.mark.parametrize("rows_per_call", [1, 5, 8, 16])
    def test_diversity_is_logged_while_training(self, rows_per_call):
        """Of whole groups, however many rows a call was asked to have."""
        env = make_env(Reward("shown", brightness), Reward("diversity", diversity, 0.0), num_envs=16)
        rollout = collector(env, Groups(4, 4), rows_per_call=rows_per_call).collect(0)
        close(rollout.reward_parts["diversity"][0], diversity(rollout.action[0], rollout.group))


class TestScores:
    @pytest.mark.parametrize("size", [1, 3, 8])
    def test_every_image_is_judged_against_its_own_prompt(self, size):
        env = make_env()
        action = painted(env.reset(torch.arange(8)))
        for start in reversed(range(0, 8, size)):  # in any order
            env.send(action[start : start + size], slice(start, min(8, start + size)))
        step = env.recv()
        assert step.reward.tolist() == [0.0] * 8
        assert bool(step.terminated.all())
        assert not step.truncated.any()
        env.reset(torch.arange(8))
        env.send(action.roll(1, 0), slice(0, 8))
        assert bool((env.recv().reward < 0).any())

    def test_parts_are_kept_and_weighted(self):
        double = Reward("double", lambda value: [2.0 * v for v in value], weight=0.5)
        logged = Reward("logged", lambda value: [100.0 * v for v in value], weight=0.0)
        env = make_env(Reward("value", lambda value: [float(v) for v in value]), double, logged)
        obs = env.reset(torch.arange(8))
        step = env.step(painted(obs))
        close(step.reward, 2 * obs[:, 0])
        close(step.reward_parts["double"], 2 * obs[:, 0])
        close(step.reward_parts["logged"], 100 * obs[:, 0])
        assert env.reward_weights == {}

    def test_combined_as_advantages_the_weights_go_to_the_learner(self):
        env = make_env(Reward("a", value_error, 2.0), Reward("b", value_error, 0.0), normalize="advantage")
        assert env.reward_weights == {"a": 2.0, "b": 0.0}

    def test_normalised_over_all_rows_and_not_over_a_micro_batch(self):
        def shown(images: Tensor) -> Tensor:
            return images.mean((1, 2, 3))

        whole, pieces = make_env(shown, normalize="reward"), make_env(shown, normalize="reward")
        action = painted(whole.reset(torch.arange(8)))
        pieces.reset(torch.arange(8))
        for start in range(0, 8, 2):
            pieces.send(action[start : start + 2], slice(start, start + 2))
        close(pieces.recv().reward, whole.step(action).reward)


def fails(images: Tensor, value: list[int]) -> list[float]:
    if 9 in value:
        raise RuntimeError("no nines")
    return [float(v) for v in value]


def hangs(images: Tensor, value: list[int]) -> list[float]:
    if 9 in value:
        time.sleep(30)
    return [float(v) for v in value]


def silent(images: Tensor, value: list[int]) -> list[float | None]:
    return [None if v == 9 else float(v) for v in value]


class TestFailures:
    @pytest.mark.parametrize("reward", [fails, hangs, silent], ids=lambda f: f.__name__)
    def test_mask_their_own_rows_and_nothing_else(self, reward):
        """Rows are sent two at a time: a call that fails or hangs takes its micro-batch with it."""
        env = make_env(Reward("r", reward, timeout_s=0.2))
        obs = env.reset(torch.arange(8))
        for start in range(0, 8, 2):
            env.send(painted(obs)[start : start + 2], slice(start, start + 2))
        step = env.recv()
        nine = obs[:, 0] == 9
        lost = nine if reward is silent else nine.reshape(4, 2).any(1).repeat_interleave(2)
        assert torch.equal(~step.valid, lost)
        assert torch.equal(step.reward.isnan(), lost)
        close(step.reward[~lost], obs[~lost, 0])
        assert env.metrics()["reward/masked_frac"] == pytest.approx(float(lost.float().mean()))

    def test_a_picture_that_is_not_a_number_has_no_score(self):
        env = make_env()
        action = painted(env.reset(torch.arange(8)))
        action[3, 0, 0, 0] = torch.nan
        step = env.step(action)
        assert step.valid.tolist() == [i != 3 for i in range(8)]

    def test_the_next_batch_is_scored_as_if_nothing_had_happened(self):
        env = make_env(fails)
        assert not env.step(painted(env.reset(torch.arange(8)))).valid.any()
        harmless = next(s for s in range(8) if env.reset(torch.full((8,), s))[0, 0] != 9)
        obs = env.reset(torch.full((8,), harmless))
        close(env.step(painted(obs)).reward, obs[:, 0])

    def test_a_failed_row_is_a_masked_row_of_the_rollout(self):
        walker = collector(make_env(silent, num_envs=16), Groups(4, 4))
        for iteration in range(2):  # 8 prompts: one of these has the nine
            rollout = walker.collect(iteration)
            nine = rollout.obs[0, :, 0] == 9
            assert torch.equal(rollout.weight[0] == 0, nine)
            out = GroupAdvantage()(rollout, None, None)
            assert bool(out.advantage.isfinite().all())


def collector(env: PromptEnv, groups: Groups, **kwargs: Any) -> Collector:
    torch.manual_seed(0)
    policy = FlowPolicy(MLPField(4, SHAPE, width=8), FlowSDE(), num_steps=3)
    return Collector(env, policy, ChainLikelihood(), AllButLast(), groups, **kwargs)


class TestRollout:
    def test_pictures_are_sampled_for_the_prompt_they_are_judged_against(self):
        seen: list[tuple[Tensor, list[int]]] = []

        def keep(images: Tensor, value: list[int]) -> Tensor:
            seen.append((images, value))
            return images.mean((1, 2, 3))

        walker = collector(make_env(keep, num_envs=16), Groups(4, 4), rows_per_call=8)
        rollout = walker.collect(3)
        assert torch.equal(torch.cat([images for images, _ in seen]), rollout.action[0])
        assert [v for _, values in seen for v in values] == rollout.obs[0, :, 0].tolist()
        close(rollout.reward[0], rollout.action[0].mean((1, 2, 3)))
        assert rollout.obs[0, :, 0].reshape(4, 4).unique(dim=1).shape == (4, 1)

    def test_two_processes_get_the_prompts_and_pictures_of_one(self):
        whole = collector(make_env(num_envs=16), Groups(4, 4)).collect(3)
        parts = [collector(make_env(num_envs=8), Groups(4, 4, r, 2)).collect(3) for r in range(2)]
        for name in ("obs", "action", "reward"):
            close(torch.cat([getattr(p, name) for p in parts], 1), getattr(whole, name))

    def test_any_iteration_can_be_the_first(self):
        straight = collector(make_env(num_envs=16), Groups(4, 4))
        for i in range(3):
            straight.collect(i)
        other = collector(make_env(num_envs=16), Groups(4, 4)).collect(3)
        last = straight.collect(3)
        assert torch.equal(last.obs, other.obs)
        assert torch.equal(last.action, other.action)

    def test_the_control_moves_parts_with_the_reward(self):
        walker = collector(make_env(silent, num_envs=16), Groups(4, 4))
        rollout = walker.collect(0)
        rollout.reward_parts["copy"] = rollout.reward.clone()
        permute_rewards(rollout, torch.Generator().manual_seed(0))
        same = (rollout.reward == rollout.reward_parts["copy"]) | rollout.reward.isnan()
        assert bool(same.all())
        assert torch.equal(rollout.weight == 0, rollout.reward.isnan())

    def test_scoring_runs_while_the_next_micro_batch_is_sampled(self):
        """The first score is held back until the second micro-batch has been sent."""
        sent_twice = threading.Event()

        def waits(images: Tensor) -> Tensor:
            return images.mean((1, 2, 3)) if sent_twice.wait(10) else torch.full((len(images),), torch.nan)

        env = make_env(waits)
        action = painted(env.reset(torch.arange(8)))
        env.send(action[:4], slice(0, 4))
        env.send(action[4:], slice(4, 8))
        sent_twice.set()
        close(env.recv().reward, action.mean((1, 2, 3)))

    def test_the_collector_samples_on_while_the_first_micro_batch_is_scored(self):
        """The second is not sampled before the first is in its reward, which has no score before the second is sampled."""
        scoring, sampled, started = threading.Event(), threading.Event(), []

        def waits(images: Tensor) -> Tensor:
            scoring.set()
            return images.mean((1, 2, 3)) if sampled.wait(10) else torch.full((len(images),), torch.nan)

        walker = collector(make_env(waits, num_envs=16), Groups(4, 4), rows_per_call=8)
        sample = walker.policy.sample

        def watched(*args: Any, **kwargs: Any) -> Chain:
            started.append(not started or scoring.wait(10))
            chain = sample(*args, **kwargs)
            sampled.set() if len(started) == 2 else None
            return chain

        walker.policy.sample = watched  # type: ignore[method-assign]
        rollout = walker.collect(0)
        assert started == [True, True]
        close(rollout.reward[0], rollout.action[0].mean((1, 2, 3)))
