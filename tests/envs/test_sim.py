"""SimEnv by hand: a counter that pays its own number shows what is counted, discounted, kept and begun anew."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlflow.envs.arithmetic import ON_DEVICE
from rlflow.envs.seeds import TRAINING, episode_seeds, evaluation_seeds, first_seed, mix, narrow, normal, uniform
from rlflow.envs.sim import Outcome, Sim, SimEnv
from rlflow.envs.simulators.toy import ToyBandit, ToyReach, ToyRoutes
from rlflow.types import Tree, tree_leaves


class Counter(Sim):
    """Step k of an episode pays k. Row b terminates at step 3 b + 2; one number observed, 100 seed + k, in one buffer."""

    def __init__(self, num_envs: int = 3, horizon: int = 6, low: float = -1.0, high: float = 1.0):
        self.num_envs, self.horizon = num_envs, horizon
        self.low, self.high = torch.tensor([low, low]), torch.tensor([high, high])
        self.obs_spec = torch.empty(1, device="meta")
        self.clock, self.seeds = torch.zeros(num_envs, dtype=torch.long), torch.zeros(num_envs, dtype=torch.long)
        self.buffer, self.seen = torch.zeros(num_envs, 1), []
        self.asked: list[tuple[list[int], list[bool]]] = []

    def observe(self) -> Tensor:
        self.buffer[:, 0] = (100 * self.seeds + self.clock).float()
        return self.buffer

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        self.asked.append((seeds.tolist(), mask.tolist()))
        self.seeds, self.clock = torch.where(mask, seeds, self.seeds), torch.where(mask, 0, self.clock)
        return self.observe()

    def advance(self, action: Tensor) -> Outcome:
        self.seen.append(action.clone())
        self.clock = self.clock + 1
        done = self.clock == 3 * torch.arange(self.num_envs) + 2
        success = {"success": (self.clock == 1).float(), "clock": self.clock.float()}
        return Outcome(self.observe(), self.clock.double(), done, info=success)


def made(chunk: int, gamma: float = 0.5, **settings: Any) -> SimEnv:
    env = SimEnv(Counter(**settings), chunk, gamma)
    env.reset(torch.arange(env.num_envs))
    return env


class TestChunks:
    """Rows 0, 1, 2 terminate at steps 2, 5, 8; the limit is 6 steps; a chunk is 4."""

    def steps(self) -> list[Any]:
        env = made(4)
        return [env.step(torch.zeros(3, 4, 2)) for _ in range(2)]

    def test_rewards_are_discounted_inside_and_stop_at_the_end(self):
        first, second = self.steps()
        assert first.reward.tolist() == [1 + 2 / 2, *[1 + 2 / 2 + 3 / 4 + 4 / 8] * 2]
        assert second.reward.tolist() == [1 + 2 / 2, 5, 5 + 6 / 2]  # row 0 is in its second episode

    def test_the_steps_carried_out_are_told(self):
        first, second = self.steps()
        assert first.num_steps.tolist() == [2, 4, 4]
        assert second.num_steps.tolist() == [2, 1, 2]

    def test_an_end_and_a_time_limit_are_two_things(self):
        first, second = self.steps()
        assert first.terminated.tolist() == [True, False, False]
        assert second.terminated.tolist() == [True, True, False]
        assert first.truncated.tolist() == [False] * 3
        assert second.truncated.tolist() == [False, False, True]

    def test_what_was_reached_is_kept_and_what_comes_next_is_another_episode(self):
        first, second = self.steps()
        assert first.final_obs[:, 0].tolist() == [2, 104, 204]
        assert second.final_obs[1:, 0].tolist() == [105, 206]
        following = episode_seeds(torch.arange(3), torch.tensor(1))
        assert torch.equal(first.obs[0, 0], (100 * following[0]).float())
        assert torch.equal(second.obs[1:, 0], (100 * following[1:]).float())

    def test_columns_of_the_simulator_are_those_of_the_last_step_carried_out(self):
        first, second = self.steps()
        assert first.info["clock"].tolist() == [2, 4, 4]
        assert second.info["clock"].tolist() == [2, 5, 6]

    def test_an_episode_is_reported_whole_and_undiscounted_where_it_ends(self):
        first, second = self.steps()
        assert first.info["episode_return"].nan_to_num(-1).tolist() == [3, -1, -1]
        assert second.info["episode_return"].tolist() == [3, 15, 21]
        assert second.info["episode_length"].tolist() == [2, 5, 6]
        assert first.info["success"].nan_to_num(-1).tolist() == [1, -1, -1]  # reached once, at step 1
        assert second.info["success"].tolist() == [1, 1, 1]

    def test_the_horizon_counts_chunks_that_have_begun(self):
        assert [made(chunk).horizon for chunk in (1, 2, 4, 6, 7)] == [6, 3, 2, 1, 1]

    def test_termination_at_the_time_limit_is_a_termination(self):
        env = made(2, horizon=2)
        step = env.step(torch.zeros(3, 2, 2))
        assert step.terminated.tolist() == [True, False, False]
        assert step.truncated.tolist() == [False, True, True]


class TestActions:
    def test_are_stretched_to_the_bounds_and_clipped(self):
        env = made(2, low=-0.4, high=0.8)
        env.step(torch.tensor([[[-1.0, 0.0], [1.0, 9.0]]]).expand(3, 2, 2))
        torch.testing.assert_close(env.sim.seen[0][0], torch.tensor([-0.4, 0.2]))
        torch.testing.assert_close(env.sim.seen[1][0], torch.tensor([0.8, 0.8]))

    def test_are_clipped_where_the_bounds_are_the_policys(self):
        env = made(1)
        env.step(torch.tensor([[[-3.0, 0.5]], [[3.0, -0.5]], [[torch.nan, 1.0]]]))
        assert env.sim.seen[0].nan_to_num(9).tolist() == [[-1, 0.5], [1, -0.5], [9, 1]]

    def test_are_unchanged_to_the_bit_between_minus_1_and_1(self):
        env, action = made(1), torch.rand(3, 1, 2) * 2 - 1
        env.step(action)
        assert torch.equal(env.sim.seen[0], action[:, 0])

    @pytest.mark.parametrize(("low", "high", "sent"), [(0.0, torch.inf, 0.0), (-torch.inf, 1.0, 1.0)])
    def test_of_one_bound_are_unchanged_up_to_it(self, low, high, sent):
        env = made(1, low=low, high=high)
        env.step(torch.tensor([[[-3.0, 0.5]], [[3.0, 0.5]], [[0.25, 0.5]]]))
        assert sent in env.sim.seen[0][:, 0].tolist()
        assert env.sim.seen[0][2].tolist() == [0.25, 0.5]
        assert bool(((env.sim.seen[0] >= low) & (env.sim.seen[0] <= high)).all())

    def test_never_leave_the_bounds_by_a_rounding(self):
        low, high = -0.2944011688232422, 0.8352431654930115  # stretching 1 gives the next float32 above
        env = made(1, low=low, high=high)
        env.step(torch.tensor([[[-1.0, 1.0]]]).expand(3, 1, 2))
        assert float(env.sim.seen[0].max()) <= float(env.sim.high[0])
        assert float(env.sim.seen[0].min()) >= float(env.sim.low[0])

    @pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (torch.nan, 1.0)])
    def test_bounds_that_are_none_are_refused(self, low, high):
        with pytest.raises(ValueError, match="action bounds need low <= high"):
            made(1, low=low, high=high)

    def test_are_left_alone_where_there_is_no_bound(self):
        env = made(1, low=-torch.inf, high=torch.inf)
        env.step(torch.full((3, 1, 2), 7.0))
        assert env.sim.seen[0].tolist() == [[7.0, 7.0]] * 3


class TestOnce:
    """Rows that nobody looks at after their end rest as they ended; until then nothing differs."""

    @pytest.mark.parametrize("chunk", [1, 2, 4])
    def test_rows_rest_after_their_first_end(self, chunk):
        actions, plays = torch.zeros(8 // chunk, 3, chunk, 2), []
        for once in (False, True):
            env = made(chunk)
            env.once = once
            plays.append([env.step(action) for action in actions])
        alive = torch.ones(3, dtype=torch.bool)
        for one, two in zip(*plays, strict=True):
            pairs = zip(*map(tree_leaves, ({**vars(s), "obs": s.reached} for s in (one, two))), strict=True)
            assert all(torch.equal(a[alive].nan_to_num(-1), b[alive].nan_to_num(-1)) for a, b in pairs)
            assert not (two.valid | two.ended)[~alive].any()
            assert (two.num_steps[~alive] == 0).all()
            alive = alive & ~one.ended
        assert not alive.any()
        assert len(env.sim.asked) == 1, "nothing began anew"
        assert env.reset(torch.arange(3)).flatten().tolist() == [0, 100, 200]
        assert env.step(actions[0]).valid.all()


class TestArrays:
    """A simulator may answer with arrays, be given them, and use its buffers again."""

    class InArrays(Counter):
        arrays = True

        def advance(self, action: Any) -> Outcome:
            assert isinstance(action, np.ndarray)
            out = super().advance(torch.from_numpy(action))
            return Outcome(out.obs.numpy(), out.reward.numpy(), out.terminated.numpy(), None, None, out.info)

    @pytest.mark.parametrize("chunk", [1, 4])
    def test_change_nothing(self, chunk):
        for step, same in zip(self.played(Counter, chunk), self.played(self.InArrays, chunk), strict=True):
            for one, two in zip(*map(tree_leaves, map(vars, (step, same))), strict=True):
                assert torch.equal(one.nan_to_num(-1), two.nan_to_num(-1))

    def played(self, kind: type[Counter], chunk: int) -> list[Any]:
        env = SimEnv(kind(), chunk, 0.5)
        env.reset(torch.arange(3))
        return [env.step(torch.full((3, chunk, 2), 0.1 * k)) for k in range(5)]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_actions_of_another_dtype_or_with_a_graph_are_taken(self, dtype):
        env, action = made(1), torch.full((3, 1, 2), 0.5, dtype=dtype, requires_grad=True)
        env.step(action)
        assert env.sim.seen[0].tolist() == [[0.5, 0.5]] * 3
        assert env.sim.seen[0].dtype == torch.float32


class TestContract:
    """What would broadcast in silence is refused at the first step, by the name of the field."""

    @pytest.mark.parametrize("horizon", [0, -1])
    def test_a_time_limit_below_one_step_is_refused(self, horizon):
        with pytest.raises(ValueError, match=f"Counter: the time limit must be at least 1 step, got horizon={horizon}"):
            made(1, horizon=horizon)

    @pytest.mark.parametrize(
        ("field", "change", "message"),
        [
            ("reward", lambda v: v.sum(), r"reward has shape \(\) and dtype torch.float64, it must be \(3,\) float"),
            ("reward", lambda v: v.unsqueeze(1), r"reward has shape \(3, 1\)"),
            ("reward", lambda v: v.long(), "reward has shape .* dtype torch.int64"),
            ("reward", lambda v: v.tolist(), r"reward is a list, it must be a tensor \(3,\) of float"),
            ("terminated", lambda v: v.float(), "terminated has shape .* dtype torch.float32, it must be .* bool"),
            ("truncated", lambda v: torch.zeros(3, 1, dtype=torch.bool), r"truncated has shape \(3, 1\)"),
            ("info", lambda v: {"clock": v["clock"][:, None]}, r"info\['clock'\] has shape \(3, 1\)"),
            ("obs", lambda v: v.double(), r"obs has shape \(3, 1\) and dtype torch.float64, .* \(3, 1\) torch.float32"),
            ("obs", lambda v: v[:, 0], r"obs has shape \(3,\)"),
            ("obs", lambda v: {"x": v}, "obs is a dict, it must be a tensor"),
        ],
    )
    def test_a_field_of_another_shape_or_dtype_is_refused(self, monkeypatch, field, change, message):
        right = Counter.advance
        monkeypatch.setattr(Counter, "advance", lambda s, a: wrong(right(s, a), field, change))
        with pytest.raises(ValueError, match=rf"Counter.advance: {message}"):
            made(1).step(torch.zeros(3, 1, 2))


def wrong(out: Outcome, field: str, change: Any) -> Outcome:
    return replace(out, **{field: change(getattr(out, field))})


class TestResets:
    def test_only_ended_rows_begin_anew_and_only_from_their_first_seed_and_number(self):
        env = made(1)
        for _ in range(4):
            env.step(torch.zeros(3, 1, 2))
        masks = [mask for _, mask in env.sim.asked]
        assert masks == [[True] * 3, [True, False, False], [True, False, False]]
        begun = [seeds[0] for seeds, mask in env.sim.asked if mask[0]]
        assert begun == [0, *(int(episode_seeds(torch.tensor(0), torch.tensor(n))) for n in (1, 2))]

    def test_a_masked_reset_counts_from_episode_0_again(self):
        env = made(1)
        for _ in range(2):
            env.step(torch.zeros(3, 1, 2))
        obs = env.reset(torch.tensor([7, 8, 9]), torch.tensor([True, True, False]))
        assert obs[:, 0].tolist() == [700, 800, 202]
        assert env.episode.tolist() == [0, 0, 0]
        assert env.elapsed.tolist() == [0, 0, 2]


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device: a number, or a shape that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


class TestDevices:
    @pytest.mark.parametrize("kind", [ToyRoutes, ToyReach, ToyBandit])
    def test_nothing_waits_for_the_device_and_both_arithmetics_agree(self, kind, monkeypatch):
        env = kind(16)
        env.reset(torch.arange(16))
        actions = torch.rand(20, 16, *env.action_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        expected = [env.step(a) for a in actions]
        monkeypatch.setattr("rlflow.envs.sim.ON_CPU", ON_DEVICE)  # as where asking is not free
        env = kind(16)
        env.reset(torch.arange(16))
        with NoWaiting():
            found = [env.step(a) for a in actions]
        assert bool(torch.stack([s.ended for s in found]).any())
        for one, two in zip(found, expected, strict=True):
            parts = zip(*map(tree_leaves, map(vars, (one, two))), strict=True)
            assert all(a.dtype == b.dtype and torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in parts)

    def test_asking_is_seen(self):
        with NoWaiting(), pytest.raises(AssertionError):
            bool(torch.ones(2).any())


class TestRefusals:
    def test_settings_out_of_range(self):
        for chunk, gamma in ((0, 0.9), (1, 0.0), (1, 1.1)):
            with pytest.raises(ValueError, match="chunk >= 1 and 0 < gamma <= 1"):
                SimEnv(Counter(), chunk, gamma)

    def test_a_chunk_longer_than_the_simulator_can_hold(self):
        sim = Counter()
        sim.max_chunk = 1
        with pytest.raises(ValueError, match="use chunk=1"):
            SimEnv(sim, 2)

    def test_no_state_where_the_simulator_has_none(self):
        env = made(1)
        assert env.exact_resume is False
        assert env.state_dict() == {}


class TestSeeds:
    def test_numbers_are_uniform_and_normal(self):
        u, z = uniform(torch.arange(20000), 3), normal(torch.arange(20000), 3)
        assert float(u.min()) >= 0
        assert float(u.max()) < 1
        for k in range(3):
            counts = torch.histc(u[:, k], 10, 0, 1)
            assert float((counts / 2000 - 1).abs().max()) < 0.1
        torch.testing.assert_close(z.mean(0), torch.zeros(3, dtype=torch.float64), atol=0.03, rtol=0)
        torch.testing.assert_close(z.T.cov(), torch.eye(3, dtype=torch.float64), atol=0.05, rtol=0)
        assert float(z.abs().max()) < 6

    def test_narrow_seeds_of_evaluation_are_none_of_training(self):
        """Short ones stay; 2^40 + i leaves i as remainder."""
        short, long = torch.arange(1000), 2**40 + torch.arange(1000)
        assert torch.equal(narrow(short), short)
        assert not set(narrow(long).tolist()) & set(short.tolist())
        assert len(set(narrow(long).tolist())) == 1000
        assert int(narrow(long).min()) >= 0
        assert int(narrow(long).max()) < 2**31

    def test_neighbouring_seeds_have_nothing_in_common(self):
        u = uniform(torch.arange(20000), 2)
        torch.testing.assert_close(torch.stack([u[1:, 0], u[:-1, 0]]).corrcoef()[0, 1].abs() < 0.03, torch.tensor(True))
        assert len(u.unique()) == u.numel()

    @given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 5))
    def test_a_row_does_not_depend_on_the_others(self, seed, others):
        alone = uniform(torch.tensor([seed]), 3)
        among = uniform(torch.cat([torch.arange(others), torch.tensor([seed])]), 3)
        assert torch.equal(alone[0], among[-1])

    def test_matches_the_published_generator(self):
        """SplitMix64 from state 0: the first three outputs of the reference implementation."""
        golden = 0x9E3779B97F4A7C15
        expected = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
        for k, value in enumerate(expected, 1):
            state = (golden * k) % 2**64
            found = int(mix(torch.tensor(state - 2**64 if state >= 2**63 else state)))
            assert found % 2**64 == value
        drawn = uniform(torch.tensor([0]), 3)[0]
        assert drawn.tolist() == [(value >> 11) / 2**53 for value in expected]

    def test_later_episodes_have_seeds_of_training_and_the_first_its_own(self):
        first = torch.tensor([5, 2**40])
        assert torch.equal(episode_seeds(first, torch.tensor(0)), first)
        later = torch.stack([episode_seeds(first, torch.tensor(n)) for n in range(1, 2000)])
        assert int(later.min()) >= 0
        assert int(later.max()) < TRAINING
        assert len(later.unique()) == later.numel()

    @pytest.mark.parametrize("seed", [0, 1, 17, 2**20 - 1, 2**20, 2**62 + 5, 2**63 - 1])
    def test_evaluation_has_seeds_that_no_training_run_can_have(self, seed):
        chosen = evaluation_seeds(seed, 100)
        assert len(chosen.unique()) == 100
        assert int(chosen.min()) >= TRAINING > first_seed(seed) >= 0

    def test_runs_begin_far_from_one_another(self):
        """The promise of `first_seed`: whatever two runs differ by, up to a million."""
        first = torch.tensor([first_seed(d) for d in range(1, 2**20, 7)])
        apart = torch.minimum(first, TRAINING - first) * torch.arange(1, 2**20, 7)
        assert int(apart.min()) * 3 > TRAINING
