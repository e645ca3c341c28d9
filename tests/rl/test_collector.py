"""Collector: rollouts that do not depend on batching, processes or history; masks, modes, and the control."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from rlflow.envs.base import VecEnv
from rlflow.envs.simulators.toy import ToyReach
from rlflow.envs.wrappers import RewardScaling
from rlflow.flow.squash import Tanh
from rlflow.flow.steps import AllButLast, Fraction, OneRandom, Window
from rlflow.models.mlp import MLPField, side_by_side
from rlflow.rl.advantages import GAE
from rlflow.rl.collector import Collector, permute_rewards
from rlflow.rl.groups import Groups
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.optim import AdamW, NonFiniteError
from rlflow.types import Rollout, Step, tree_leaves

PLANS = [AllButLast(), Window(size=2), OneRandom(), Fraction(0.6)]


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def assert_same(a: Rollout, b: Rollout, atol: float = 0.0) -> None:
    for name in ("action", "reward", "weight", "terminated", "truncated", "row_ids", "group"):
        close(getattr(a, name), getattr(b, name), atol)
    for one, two in zip(
        tree_leaves(a.obs) + tree_leaves(a.last_obs), tree_leaves(b.obs) + tree_leaves(b.last_obs), strict=True
    ):
        close(one, two, atol)
    for name in ("x", "x_next", "t", "t_next", "old_log_prob"):
        close(getattr(a.evidence, name), getattr(b.evidence, name), atol)
    close(a.cond["pooled"], b.cond["pooled"], atol)


@pytest.mark.parametrize("env", ["image", "reach"])
@pytest.mark.parametrize("steps", PLANS, ids=repr)
class TestReproducible:
    def test_micro_batches_change_nothing(self, make, env, steps):
        whole = make(env, steps=steps).collect(3)
        for rows_per_call in (1, 4, 9):
            part = make(env, steps=steps, collector={"rows_per_call": rows_per_call}).collect(3)
            # toy rewards are float32, and so is what a state inherits from an action
            assert_same(part, whole, 1e-6)

    def test_two_processes_concatenated_are_one(self, make, env, steps):
        whole = make(env, steps=steps).collect(3)
        parts = [make(env, steps=steps, groups=Groups(4, 4, rank, 2)).collect(3) for rank in range(2)]
        for name in ("action", "reward", "weight", "row_ids"):
            close(torch.cat([getattr(p, name) for p in parts], 1), getattr(whole, name), 1e-6)
        assert torch.equal(torch.cat([p.group for p in parts]), whole.group)

    def test_an_iteration_does_not_depend_on_those_before(self, make, env, steps):
        straight, resumed = make(env, steps=steps), make(env, steps=steps)
        for i in range(3):
            straight.collect(i)
        assert_same(straight.collect(3), resumed.collect(3))

    def test_rows_steps_and_iterations_have_noise_of_their_own(self, make, env, steps):
        parts = make(env, steps=steps)
        action = torch.cat([parts.collect(i).action.flatten(0, 1).flatten(1) for i in range(2)])
        assert len(action.unique(dim=0)) == len(action)


def test_a_step_of_ones_own_for_every_row_and_outer_step(make):
    """pi_RL draws the noisy step of each environment step apart."""
    t = make("reach", steps=OneRandom()).collect().evidence.t.reshape(4, 16)
    assert not torch.equal(t[0], t[1])
    assert len(t[0].unique()) > 1


def test_a_running_normaliser_sees_the_first_observations_before_the_first_action(make):
    """And nothing else while a rollout is made: it would change the ratio of what was sampled."""
    field = MLPField(4, ToyReach.action_shape, width=12, running=True)
    parts = make("reach", field=field)
    first = parts.env.reset(parts.groups.seeds(0))
    rollout = parts.collect(0)
    fitted = MLPField(4, ToyReach.action_shape, width=12)
    first = side_by_side(first)
    fitted.normalizer.fit(first)
    assert torch.equal(field.normalizer.moments, fitted.normalizer.moments)
    close(rollout.cond["pooled"][: len(first)], fitted.normalizer(first.double()), 1e-6)
    parts.collect(1)
    assert torch.equal(field.normalizer.moments, fitted.normalizer.moments)


class TestEvidence:
    @pytest.mark.parametrize("env", ["image", "reach"])
    def test_stands_in_the_order_of_the_flattened_rows(self, make, env):
        parts = make(env, collector={"rows_per_call": 4})
        rollout = parts.collect()
        cond = parts.policy.encode(rollout.flat(rollout.obs))
        score = ChainLikelihood().score(parts.policy, cond, rollout.evidence)
        close(score.log_prob.detach(), rollout.evidence.old_log_prob)
        close(rollout.cond["pooled"], cond["pooled"])

    def test_the_action_is_where_the_chain_ended_before_the_squash(self, make):
        parts = make()
        parts.policy.squash = Tanh()
        rollout = parts.collect()
        close(parts.env.action, rollout.action[0].tanh().float(), 1e-7)

    def test_a_group_that_shares_its_start_starts_from_one_noise(self, make):
        shared = make(collector={"shared_noise": True}).collect().evidence.x[:, 0]
        close(shared, shared[::4].repeat_interleave(4, 0))
        assert len(shared.unique(dim=0)) == 4
        assert len(make().collect().evidence.x[:, 0].unique(dim=0)) == 16

    def test_samples_with_the_weights_it_is_told(self, make):
        parts, old = make(), make(collector={"sample_with": "old"})
        old.policy.weights.snapshot("old")
        with torch.no_grad():
            for p in old.policy.parameters():
                p += 1.0
        assert_same(old.collect(), parts.collect())
        assert old.policy.weights.active == "live"

    def test_prompts_of_a_group_are_encoded_once(self, make):
        parts = make()
        parts.collect()
        assert parts.policy.encoder_rows == 4


class Scripted(VecEnv):
    """Four steps; row r ends at step r (terminated if even, else cut off), row 4 + r has no reward at step r."""

    action_shape, horizon, num_envs = (2,), 4, 8

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Any:
        self.clock = 0
        return self.obs()

    def obs(self) -> Tensor:
        return torch.full((8, 4), float(self.clock))

    def send(self, action: Tensor, rows: slice) -> None:
        pass

    def recv(self) -> Step:
        ends = torch.arange(8) == self.clock % 4
        odd = torch.arange(8) % 2 == 1
        reward = torch.full((8,), float(self.clock))
        failed = torch.arange(8) - 4 == self.clock % 4
        valid = ~failed | odd
        reward[failed & odd] = torch.nan  # told by a nan alone, or by `valid` alone
        self.clock += 1
        final = torch.full((8, 4), -1.0) if bool((ends & odd).any()) else None
        return Step(self.obs(), reward, ends & ~odd, ends & odd, final, valid)


def scripted(make: Any, mode: str) -> Collector:
    parts = make(groups=Groups(2, 4))
    return Collector(Scripted(), parts.policy, ChainLikelihood(), AllButLast(), parts.groups, horizon=4, mode=mode)


class TestModes:
    def test_episodes_mask_a_row_after_its_first_end(self, make):
        weight = scripted(make, "episodes").collect(0).weight
        assert weight[:, :4].T.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]

    def test_steps_carry_on(self, make):
        weight = scripted(make, "steps").collect(0).weight
        assert weight[:, :4].T.tolist() == [[1] * 4] * 4

    @pytest.mark.parametrize("mode", ["episodes", "steps"])
    def test_a_step_without_a_reward_masks_itself_only(self, make, mode):
        weight = scripted(make, mode).collect(0).weight
        assert weight[:, 4:].T.tolist() == [[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]]

    def test_episodes_start_anew_and_steps_go_on_where_they_were(self, make):
        again, onwards = scripted(make, "episodes"), scripted(make, "steps")
        for walker, first in ((again, 0.0), (onwards, 4.0)):
            walker.collect(0)
            assert float(walker.collect(1).obs[0, 0, 0]) == first

    def test_steps_mode_resumes_in_the_middle_of_an_episode(self, make):
        def fresh() -> Any:
            return make("reach", collector={"mode": "steps", "horizon": 3})

        straight, first, second = fresh(), fresh(), fresh()
        straight.collect(0), first.collect(0)
        second.collector.load_state_dict(first.collector.state_dict())
        first.collect(1)  # what was saved must not move with the environment it came from
        assert_same(second.collect(1), straight.collect(1))

    def test_a_simulator_that_cannot_be_saved_begins_anew_after_a_resume(self, make):
        def fresh() -> Any:
            parts = make("reach", collector={"mode": "steps", "horizon": 3})
            parts.env.exact_resume = False
            return parts

        first, second = fresh(), fresh()
        first.collect(0)
        assert "obs" not in first.collector.state_dict()
        second.collector.load_state_dict(first.collector.state_dict())
        assert torch.equal(second.collect(1).obs["state"][0], torch.zeros(16, 2))

    @pytest.mark.parametrize("exact", [True, False])
    @pytest.mark.parametrize("mode", ["episodes", "steps"])
    def test_the_scale_of_rewards_is_resumed_whatever_begins_anew(self, make, mode, exact):
        """It is learnt over the whole run, so the next rewards depend on it."""

        def fresh() -> Any:
            parts = make("reach", collector={"mode": mode, "horizon": 3})
            parts.env.exact_resume = exact
            parts.collector.env = RewardScaling(parts.env)
            return parts

        first, second = fresh(), fresh()
        first.collect(0)
        second.collector.load_state_dict(first.collector.state_dict())
        assert torch.equal(second.collector.env.moments, first.collector.env.moments)
        assert float(second.collector.env.moments[0]) > 0

    def test_the_primitive_steps_of_every_action_are_kept(self, make):
        assert make("reach").collect().num_steps.tolist() == [[2] * 16] * 4
        assert make("image").collect().num_steps is None

    def test_final_observations_given_only_where_something_ended_are_kept(self, make):
        rollout = scripted(make, "episodes").collect(0)
        assert rollout.final_obs[:, 0, 0].tolist() == [1.0, -1.0, 3.0, -1.0]

    def test_an_end_by_time_without_a_final_observation_is_an_error(self, make, monkeypatch):
        walker, recv = scripted(make, "episodes"), Scripted.recv

        def forgetful(self: Scripted) -> Step:
            step = recv(self)
            return Step(step.obs, step.reward, step.terminated, step.truncated, None, step.valid)

        monkeypatch.setattr(Scripted, "recv", forgetful)
        with pytest.raises(ValueError, match="without final_obs"):
            walker.collect(0)


class TestBrokenSamples:
    """A chain that ends in nan: 0 * nan would be nan in every gradient, whatever its weight."""

    @pytest.mark.parametrize("env", ["image", "reach"])
    def test_weigh_nothing_and_leave_nothing_in_the_gradient(self, make, gradient, env, monkeypatch):
        parts, broken = make(env), make(env)
        forward, spoilt = broken.policy.field.forward, []

        def once(x: Tensor, t: Tensor, dt: Tensor, cond: Any) -> Tensor:
            v = forward(x, t, dt, cond)
            if not spoilt:
                spoilt.append(1)
                v = v.clone()
                v[5] = torch.nan
            return v

        monkeypatch.setattr(broken.policy.field, "forward", once)
        clean, rollout = parts.collect(0), broken.collect(0)
        row = rollout.weight[0] == 0
        assert row.nonzero().flatten().tolist() == [5]
        assert bool(rollout.action.isfinite().all())
        assert torch.equal(rollout.action[0, ~row], clean.action[0, ~row])
        clean.weight[0, 5] = 0
        if env == "reach":
            return  # what follows in the row differs
        for expected, found in zip(gradient(parts, clean)[:1], gradient(broken, rollout)[:1], strict=True):
            assert float(found.norm()) > 0
            close(found, expected)

    def test_where_none_is_sound_the_learner_ends_the_run(self, make):
        parts = make("image", optimizer=AdamW(max_bad_steps=1))
        next(parts.policy.field.parameters()).data.fill_(torch.nan)
        with pytest.raises(NonFiniteError):
            parts.iterate(0)


class TestControl:
    def parts(self, make: Any) -> tuple[Rollout, Rollout]:
        rollout, before = make("reach").collect(), make("reach").collect()
        for r in (rollout, before):
            r.reward_parts = {
                "double": 2 * r.reward,
                "nan": torch.where(r.reward < r.reward.median(), torch.nan, r.reward),
            }
            r.weight[:, 5] = 0.0
        permute_rewards(rollout, torch.Generator().manual_seed(0))
        return rollout, before

    def test_keeps_the_multiset_and_every_episode_whole(self, make):
        after, before = self.parts(make)
        assert not torch.equal(after.reward, before.reward)
        columns = [Counter(tuple(c) for c in r.reward.T.tolist()) for r in (after, before)]
        assert columns[0] == columns[1]

    def test_moves_parts_and_masks_with_their_reward(self, make):
        after, before = self.parts(make)
        close(after.reward_parts["double"], 2 * after.reward)
        assert torch.equal(after.reward_parts["nan"].isnan(), after.reward < after.reward.median())
        assert torch.equal(after.weight[0] == 0, after.reward[0] == before.reward[0, 5])

    def test_leaves_samples_and_evidence(self, make):
        after, before = self.parts(make)
        close(after.action, before.action)
        close(after.evidence.old_log_prob, before.evidence.old_log_prob)

    def test_rewards_leave_their_groups(self, make):
        rollout = make("reach").collect()
        rollout.reward[:] = rollout.group.double()
        permute_rewards(rollout, torch.Generator().manual_seed(0))
        assert not torch.equal(rollout.reward[0], rollout.group.double())


class TestRefusals:
    def test_sizes_must_match(self, make):
        parts = make()
        with pytest.raises(ValueError, match="the environment has 8 rows, the groups of this process 16"):
            Collector(Scripted(), parts.policy, ChainLikelihood(), AllButLast(), parts.groups)
        with pytest.raises(ValueError, match=r"makes \(2,\), the environment takes \(2, 2\)"):
            Collector(ToyReach(16), parts.policy, ChainLikelihood(), AllButLast(), parts.groups)

    def test_a_one_step_episode_cannot_run_on(self, make):
        with pytest.raises(ValueError, match="use mode=episodes"):
            make(collector={"mode": "steps"})

    @pytest.mark.parametrize("mode", ["episodes", "steps"])
    def test_noise_cannot_be_shared_where_observations_differ(self, make, mode):
        with pytest.raises(ValueError, match="use shared_noise=false"):
            make("reach", collector={"shared_noise": True, "mode": mode})

    def test_without_a_likelihood_nothing_is_scored(self, make):
        parts = make(advantage=GAE())
        walker = Collector(parts.env, parts.policy, None, AllButLast(), parts.groups)
        assert walker.collect(0).evidence is None
