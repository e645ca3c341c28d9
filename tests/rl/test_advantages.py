"""Advantages: what group normalisation does not depend on, masks that touch nobody else, GAE by hand and by SB3."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from rlflow.rl.advantages import GAE, GroupAdvantage, gae, group_moments, moments, normalize
from rlflow.types import Rollout

GROUP = torch.arange(4).repeat_interleave(4)
KINDS = ["group", "epoch", "none"]


def rollout(reward: Tensor, weight: Tensor | None = None, group: Tensor = GROUP, **kwargs: object) -> Rollout:
    """(T, B) rewards, or (B,) for T = 1; every row ends at the last step unless told otherwise."""
    reward = torch.atleast_2d(reward)
    weight = torch.ones_like(reward) if weight is None else torch.atleast_2d(weight)
    last = torch.zeros_like(reward, dtype=torch.bool)
    last[-1] = True
    steps, rows = reward.shape
    blank = {"obs": reward, "action": reward, "last_obs": reward[0], "final_obs": None}
    ends = {"terminated": kwargs.pop("terminated", last), "truncated": kwargs.pop("truncated", torch.zeros_like(last))}
    ids = torch.arange(steps * rows).reshape(steps, rows)
    return Rollout(**blank, reward=reward, weight=weight, group=group, row_ids=ids, **ends, **kwargs)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group(data: Rollout, **kwargs: object) -> tuple[Tensor, Tensor]:
    """(advantage, weight) of the only step."""
    out = GroupAdvantage(**kwargs)(data, None, None)
    return out.advantage[0], out.weight[0]


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


class TestGroupByHand:
    REWARD = torch.tensor([1.0, 3.0, 0.0, 8.0], dtype=torch.float64)
    TWO = torch.tensor([0, 0, 1, 1])

    @pytest.mark.parametrize(
        ("std", "unbiased", "scale"),
        [
            ("group", False, [1.0, 1.0, 4.0, 4.0]),
            ("group", True, [2**0.5, 2**0.5, 32**0.5, 32**0.5]),
            ("epoch", False, [9.5**0.5] * 4),
            ("epoch", True, [(38 / 3) ** 0.5] * 4),
            ("none", False, [1.0] * 4),
            ("none", True, [1.0] * 4),
        ],
    )
    def test_is_the_distance_to_the_groups_mean_over_the_named_std(self, std, unbiased, scale):
        """Rewards 1, 3 | 0, 8: means 2 and 4, biased variances 1 and 16, of all four 9.5; unbiased n / (n - 1)."""
        a, weight = group(rollout(self.REWARD, group=self.TWO), std=std, unbiased=unbiased, eps=0.25)
        eps = 0.0 if std == "none" else 0.25
        expected = torch.tensor([-1.0, 1.0, -4.0, 4.0], dtype=torch.float64) / (torch.tensor(scale) + eps)
        close(a, expected, 1e-6)
        assert weight.tolist() == [1.0] * 4

    def test_is_clipped_on_both_sides(self):
        reward = torch.zeros(32, dtype=torch.float64)
        reward[0] = 1.0
        one = torch.zeros(32, dtype=torch.long)
        assert group(rollout(reward, group=one), clip=100.0)[0][0] == pytest.approx(31**0.5, rel=1e-3)
        assert float(group(rollout(reward, group=one), clip=5.0)[0].max()) == 5.0
        assert float(group(rollout(-reward, group=one), clip=5.0)[0].min()) == -5.0

    def test_is_the_same_at_every_step_and_comes_from_the_whole_return(self):
        reward = draw(3, 16)
        many = GroupAdvantage()(rollout(reward), None, None)
        one = GroupAdvantage()(rollout(reward.sum(0)), None, None)
        assert many.advantage.shape == (3, 16)
        close(many.advantage, one.advantage.expand(3, 16))


@pytest.mark.parametrize("std", KINDS)
class TestGroupInvariance:
    @pytest.mark.parametrize("scale", [3.0, 1e6, -2.0])
    def test_affine_rewards(self, std, scale):
        reward = draw(16)
        a, _ = group(rollout(reward), std=std, eps=0.0, clip=1e9)
        b, _ = group(rollout(scale * reward + 7), std=std, eps=0.0, clip=1e9)
        close(b, a * (scale if std == "none" else np.sign(scale)), 1e-8 * max(1, abs(scale)))

    def test_order_of_rows(self, std):
        reward, order = draw(16), torch.randperm(16)
        a, _ = group(rollout(reward), std=std)
        b, _ = group(rollout(reward[order], group=GROUP[order]), std=std)
        close(b, a[order])

    @pytest.mark.parametrize(
        "ids",
        [[7, 3, 9, 1], [-5, 0, 5, 2**62], [2**24, 2**24 + 1, 2**24 + 2, 2**24 + 3], [2**53, 2**53 + 1, 1, 0]],
        ids=["small", "negative", "past float32", "past float64"],
    )
    def test_group_ids_are_any_integers(self, std, ids):
        reward = draw(16)
        a, _ = group(rollout(reward), std=std)
        b, _ = group(rollout(reward, group=torch.tensor(ids)[GROUP]), std=std)
        assert torch.equal(a, b)

    def test_groups_sum_to_zero_and_have_the_unit_they_should(self, std):
        a, _ = group(rollout(draw(16)), std=std, eps=0.0, clip=1e9)
        close(a.reshape(4, 4).sum(1), torch.zeros(4, dtype=torch.float64))
        if std == "group":
            close(a.reshape(4, 4).square().mean(1), torch.ones(4, dtype=torch.float64))

    @pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
    def test_a_masked_row_is_as_good_as_absent(self, std, junk):
        reward, weight = draw(16), torch.ones(16, dtype=torch.float64)
        gone = torch.tensor([1, 6, 7, 12])
        reward[gone], weight[gone] = junk, 0.0
        kept = weight > 0
        a, w = group(rollout(reward, weight), std=std, unbiased=True)
        b, _ = group(rollout(reward[kept], group=GROUP[kept]), std=std, unbiased=True)
        close(a[kept], b)
        assert a[gone].tolist() == [0.0] * 4  # not nan: 0 * nan would poison the gradient
        assert torch.equal(w, weight)

    @pytest.mark.parametrize("constant", [0.0, 0.1, -1e6])
    def test_a_group_without_spread_gets_weight_0_and_keeps_its_place(self, std, constant):
        reward = draw(16)
        a, _ = group(rollout(reward), std="group")
        reward[4:8] = constant
        b, w = group(rollout(reward), std=std)
        assert b.shape == w.shape == (16,)
        assert w.tolist() == [1.0] * 4 + [0.0] * 4 + [1.0] * 8
        assert b[4:8].tolist() == [0.0] * 4
        if std == "group":
            close(b[:4], a[:4])

    def test_a_group_of_one_survivor_has_nothing_to_compare(self, std):
        weight = torch.ones(16, dtype=torch.float64)
        weight[1:4] = 0.0
        a, w = group(rollout(draw(16), weight), std=std)
        assert a[0] == 0
        assert w.tolist() == [0.0] * 4 + [1.0] * 12

    def test_all_rows_masked_is_all_zero(self, std):
        a, w = group(rollout(torch.full((16,), torch.nan), torch.zeros(16)), std=std)
        assert not a.any()
        assert not w.any()


class TestMissingSteps:
    """An episode of several steps: a return that lacks a reward is unknown; after the first end nothing is missing."""

    ENDS = torch.zeros(3, 16, dtype=torch.bool)

    def test_a_failed_reward_in_the_middle_masks_the_whole_row(self):
        reward, weight = draw(3, 16), torch.ones(3, 16, dtype=torch.float64)
        reward[1, 5], weight[1, 5] = torch.nan, 0.0
        out = GroupAdvantage()(rollout(reward, weight), None, None)
        kept = torch.arange(16) != 5
        expected = GroupAdvantage()(rollout(reward[:, kept], group=GROUP[kept]), None, None)
        close(out.advantage[:, kept], expected.advantage)
        assert out.weight[:, 5].tolist() == [0.0] * 3
        assert bool((out.weight[:, kept] == 1).all())

    def test_steps_after_the_first_end_are_masked_and_nothing_else(self):
        reward, weight, ends = draw(3, 16), torch.ones(3, 16, dtype=torch.float64), self.ENDS.clone()
        ends[0, 5], weight[1:, 5], reward[1:, 5] = True, 0.0, 1e9
        out = GroupAdvantage()(rollout(reward, weight, terminated=ends), None, None)
        reward[1:, 5] = 0.0
        close(out.advantage, GroupAdvantage()(rollout(reward), None, None).advantage)
        assert torch.equal(out.weight, weight)


class TestAdvantageLevel:
    """MixGRPO: per-reward advantages are averaged, so that no reward's scale matters."""

    PARTS: ClassVar = {"a": draw(16, seed=1), "b": draw(16, seed=2)}

    def advantage(self, parts: dict[str, Tensor], weights: dict[str, float], **kwargs: object) -> Tensor:
        data = rollout(torch.zeros(16, dtype=torch.float64), reward_parts={n: p[None] for n, p in parts.items()})
        data.reward_weights = weights
        return group(data, **({"eps": 0.0, "clip": 1e9} | kwargs))[0]

    def alone(self, name: str) -> Tensor:
        return group(rollout(self.PARTS[name]), eps=0.0, clip=1e9)[0]

    def test_is_the_weighted_mean_of_the_advantages_of_each(self):
        close(self.advantage(self.PARTS, {"a": 3.0, "b": -1.0}), 0.75 * self.alone("a") - 0.25 * self.alone("b"), 1e-10)

    def test_weights_are_normalised(self):
        close(
            self.advantage(self.PARTS, {"a": 3.0, "b": 1.0}),
            self.advantage(self.PARTS, {"a": 300.0, "b": 100.0}),
            1e-10,
        )

    def test_the_scale_of_one_reward_is_irrelevant_here_and_would_dominate_a_sum(self):
        even = {"a": 1.0, "b": 1.0}
        scaled = self.PARTS | {"a": 1e6 * self.PARTS["a"]}
        close(self.advantage(scaled, even), self.advantage(self.PARTS, even), 1e-8)
        total = group(rollout(scaled["a"] + scaled["b"]), eps=0.0, clip=1e9)[0]
        close(total, self.alone("a"), 1e-4)

    def test_a_reward_of_weight_0_takes_no_part_even_when_it_failed(self):
        parts = self.PARTS | {"b": torch.full((16,), torch.nan)}
        close(self.advantage(parts, {"a": 1.0, "b": 0.0}), self.alone("a"), 1e-10)

    def test_a_reward_that_does_not_differ_adds_nothing_and_a_row_counts_while_another_does(self):
        parts = self.PARTS | {"b": torch.ones(16, dtype=torch.float64)}
        data = rollout(torch.zeros(16, dtype=torch.float64), reward_parts={n: p[None] for n, p in parts.items()})
        data.reward_weights = {"a": 1.0, "b": 1.0}
        a, w = group(data, eps=0.0, clip=1e9)
        close(a, 0.5 * self.alone("a"), 1e-10)
        assert bool((w == 1).all())

    def test_the_clip_is_of_the_sum(self):
        a = self.advantage(self.PARTS, {"a": 1.0, "b": 1.0})
        close(self.advantage(self.PARTS, {"a": 1.0, "b": 1.0}, clip=0.5), a.clamp(-0.5, 0.5))


class TestMoments:
    def test_are_weighted_and_in_double_precision(self):
        value = torch.tensor([1e8, 1e8 + 8, torch.nan, 1e8 + 16])
        mean, std, count = moments(value, torch.tensor([1.0, 1.0, 0.0, 2.0]))
        assert (float(mean), float(count)) == (1e8 + 10, 4.0)
        assert float(std) == pytest.approx(44**0.5)

    def test_group_moments_stand_at_every_row(self):
        mean, var, count = group_moments(torch.tensor([1.0, 3.0, 5.0]), torch.ones(3), torch.tensor([9, 4, 9]))
        assert mean.tolist() == [3.0, 3.0, 3.0]
        assert var.tolist() == [4.0, 0.0, 4.0]
        assert count.tolist() == [2.0, 1.0, 2.0]

    def test_group_moments_leave_out_what_is_masked(self):
        value, weight = torch.tensor([1.0, torch.nan, 3.0, torch.inf]), torch.tensor([1.0, 0.0, 1.0, 0.0])
        mean, var, count = group_moments(value, weight, torch.tensor([0, 0, 0, 1]))
        assert mean.tolist() == [2.0, 2.0, 2.0, 0.0]
        assert var.tolist() == [1.0, 1.0, 1.0, 0.0]
        assert count.tolist()[:3] == [2.0] * 3

    @pytest.mark.parametrize("advantage", [GroupAdvantage("epoch"), GroupAdvantage("group"), GAE()], ids=repr)
    def test_ranks_agree_with_one_process(self, advantage, ranks):
        reward, value, weight = draw(2, 16), draw(2, 16, seed=3), torch.ones(2, 16, dtype=torch.float64)
        weight[:, 3], weight[:, 8:12] = 0.0, 0.0  # a whole group of the second rank

        def share(rows: slice) -> tuple[Tensor, Tensor]:
            mine = rollout(reward[:, rows], weight[:, rows], GROUP[rows])
            out = advantage(mine, value[:, rows], value[:, rows].flip(0))
            return out.advantage, out.weight

        parts = ranks(2, lambda rank: share(slice(8 * rank, 8 * rank + 8)))
        for one, two in zip(share(slice(0, 16)), zip(*parts, strict=True), strict=True):
            close(torch.cat(two, 1), one)


def by_bool(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool).T


class TestGAE:
    REWARD = torch.tensor([[1.0, 2.0, 4.0]] * 3, dtype=torch.float64).T
    VALUE = torch.tensor([[10.0, 20.0, 30.0]] * 3, dtype=torch.float64).T
    NEXT = torch.tensor([[20.0, 30.0, 40.0], [20.0, 30.0, 40.0], [20.0, 50.0, 40.0]], dtype=torch.float64).T

    def test_by_hand_with_a_termination_and_a_truncation(self):
        """gamma = 1/2, lambda = 1/2. Column 0 runs on, 1 terminates at step 1, 2 is cut off there at a state worth 50.

        Column 0: delta = 1 + 10 - 10, 2 + 15 - 20, 4 + 20 - 30 = 1, -3, -6; A = -6, -3 - 6/4, 1 - 4.5/4.
        Column 1: delta_1 = 2 - 20 = -18 = A_1; A_0 = 1 - 18/4. Column 2: delta_1 = 2 + 25 - 20 = 7; A_0 = 1 + 7/4.
        """
        terminated = by_bool([0, 0, 0], [0, 1, 0], [0, 0, 0])
        truncated = by_bool([0, 0, 0], [0, 0, 0], [0, 1, 0])
        a = gae(self.REWARD, self.VALUE, self.NEXT, terminated, truncated, 0.5, 0.5)
        assert a.T.tolist() == [[-0.125, -4.5, -6.0], [-3.5, -18.0, -6.0], [2.75, 7.0, -6.0]]

    def test_by_hand_with_chunks_of_different_lengths(self):
        """gamma = lambda = 1/2; the chunks of a column take 2, 1, 3 primitive steps: gamma^h is 1/4, 1/2, 1/8.

        Column 0 runs on: delta = 1 + 20/4 - 10, 2 + 30/2 - 20, 4 + 40/8 - 30 = -4, -3, -21;
        A_1 = -3 + 1/2 1/2 (-21), A_0 = -4 + 1/4 1/2 A_1. Column 1 terminates at step 1: A_1 = 2 - 20.
        Column 2 is cut off there at a state worth 50: A_1 = 2 + 50/2 - 20.
        """
        num_steps = torch.tensor([[2, 1, 3]] * 3).T
        terminated = by_bool([0, 0, 0], [0, 1, 0], [0, 0, 0])
        truncated = by_bool([0, 0, 0], [0, 0, 0], [0, 1, 0])
        a = gae(self.REWARD, self.VALUE, self.NEXT, terminated, truncated, 0.5**num_steps, 0.5)
        assert a.T.tolist() == [[-5.03125, -8.25, -21.0], [-6.25, -18.0, -21.0], [-3.125, 7.0, -21.0]]
        mine = rollout(self.REWARD, group=torch.arange(3), terminated=terminated, truncated=truncated)
        mine.num_steps = num_steps
        out = GAE(gamma=0.5, lam=0.5, normalize=False)(mine, self.VALUE, self.NEXT)
        assert torch.equal(out.advantage, a)
        assert torch.equal(out.returns, a + self.VALUE)

    def test_one_primitive_step_each_is_no_chunk_at_all(self):
        reward, value, after = draw(6, 16), draw(6, 16, seed=1), draw(6, 16, seed=2)
        plain = GAE()(rollout(reward), value, after)
        counted = rollout(reward)
        counted.num_steps = torch.ones(6, 16, dtype=torch.long)
        out = GAE()(counted, value, after)
        close(out.advantage, plain.advantage)
        close(out.returns, plain.returns)

    def test_chunks_have_the_returns_of_their_primitive_steps(self):
        """lambda = 1: rewards discounted inside chunks, and between them by gamma^h, are the primitive return."""
        reward, gamma, lengths = draw(12, 3), 0.9, [3, 1, 4, 2, 2]
        chunked, start = [], 0
        for h in lengths:
            chunked.append(sum(gamma**i * reward[start + i] for i in range(h)))
            start += h
        num_steps, zero = torch.tensor(lengths)[:, None].expand(5, 3), torch.zeros(5, 3, dtype=torch.float64)
        ends = torch.zeros(5, 3, dtype=torch.bool)
        ends[-1] = True
        a = gae(torch.stack(chunked), zero, zero, ends, ends & ~ends, gamma ** num_steps.double(), 1.0)
        close(a[0], sum(gamma**k * reward[k] for k in range(12)))

    def test_matches_stable_baselines3(self):
        pytest.importorskip("stable_baselines3")
        from gymnasium import spaces
        from stable_baselines3.common.buffers import RolloutBuffer

        steps, rows, gamma, lam = 12, 5, 0.9, 0.8
        reward, value, last, final = (draw(*s, seed=i) for i, s in enumerate([(steps, rows)] * 2 + [(1, rows)] * 2))
        dice = torch.rand(steps, rows, generator=torch.Generator().manual_seed(5))
        terminated, truncated = dice < 0.15, dice > 0.85
        assert int(terminated.sum()) > 3
        assert int(truncated.sum()) > 3
        next_value = torch.where(truncated, final.expand_as(value), torch.cat([value[1:], last]))
        mine = gae(reward, value, next_value, terminated, truncated, gamma, lam)

        space = spaces.Box(-1, 1, (1,))
        buffer = RolloutBuffer(steps, space, space, "cpu", lam, gamma, rows)
        start = np.ones(rows)
        for t in range(steps):
            # its collect_rollouts adds gamma V(terminal observation) to the reward of a time limit
            r = reward[t] + gamma * final[0] * truncated[t]
            blank = np.zeros((rows, 1))
            buffer.add(blank, blank, r.numpy(), start, value[t].float(), torch.zeros(rows))
            start = (terminated[t] | truncated[t]).numpy()
        buffer.compute_returns_and_advantage(last[0].float(), start)
        close(mine.float(), torch.from_numpy(buffer.advantages), 1e-5)
        close((mine + value).float(), torch.from_numpy(buffer.returns), 1e-5)

    def test_lambda_1_is_the_discounted_return_less_the_value(self):
        reward, value = draw(6, 3), draw(6, 3, seed=1)
        last = torch.zeros(6, 3, dtype=torch.bool)
        last[-1] = True
        a = gae(reward, value, torch.cat([value[1:], value[:1]]), last, ~last & last, 0.9, 1.0)
        returns = torch.stack([sum(0.9 ** (k - t) * reward[k] for k in range(t, 6)) for t in range(6)])
        close(a, returns - value)

    def test_lambda_0_is_the_temporal_difference(self):
        reward, value, after = draw(6, 3), draw(6, 3, seed=1), draw(6, 3, seed=2)
        never = torch.zeros(6, 3, dtype=torch.bool)
        close(gae(reward, value, after, never, never, 0.9, 0.0), reward + 0.9 * after - value)

    def test_one_step_is_the_reward_less_the_value(self):
        reward, value = draw(1, 16), draw(1, 16, seed=1)
        out = GAE(gamma=0.7, normalize=False)(rollout(reward), value, torch.full((1, 16), 1e3))
        close(out.advantage, reward - value)
        close(out.returns, reward)

    def test_returns_are_in_reward_units_when_advantages_are_normalised(self):
        reward, value = draw(3, 16), draw(3, 16, seed=1)
        plain = GAE(normalize=False)(rollout(reward), value, value)
        out = GAE()(rollout(reward), value, value)
        close(out.returns, plain.advantage + value)
        mean, std, _ = moments(out.advantage, out.weight)
        assert float(mean) == pytest.approx(0, abs=1e-12)
        assert float(std) == pytest.approx(1, abs=1e-6)
        close(out.advantage, normalize(plain.advantage, plain.weight))

    def test_a_masked_row_touches_no_other(self):
        reward, value, weight = draw(3, 16), draw(3, 16, seed=1), torch.ones(3, 16, dtype=torch.float64)
        kept = torch.arange(16) != 5
        reward[:, 5], weight[:, 5] = torch.nan, 0.0
        out = GAE()(rollout(reward, weight), value, value)
        expected = GAE()(rollout(reward[:, kept], group=GROUP[kept]), value[:, kept], value[:, kept])
        close(out.advantage[:, kept], expected.advantage)
        close(out.returns[:, kept], expected.returns)
        assert bool(out.advantage.isfinite().all())

    def test_a_step_without_a_reward_is_no_reward_of_zero_to_the_steps_before(self):
        """They end at the value of the state before it, as at a time limit."""
        reward, value, weight = draw(4, 16), draw(4, 16, seed=1), torch.ones(4, 16, dtype=torch.float64)
        after = torch.cat([value[1:], value[:1]])
        reward[2, 5], weight[2, 5] = torch.nan, 0.0
        out = GAE(normalize=False)(rollout(reward, weight), value, after)
        short = torch.zeros(2, 16, dtype=torch.bool)
        short[-1] = True
        never = torch.zeros_like(short)
        expected = gae(reward[:2], value[:2], after[:2], never, short, 0.99, 0.95)
        close(out.advantage[:2, 5], expected[:, 5])
        close(out.advantage[3, 5], reward[3, 5] - value[3, 5])
