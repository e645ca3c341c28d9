"""Step plans are pure functions of (iteration, grid, row ids), never empty or past the grid, and end at the data."""

import math

import pytest
import torch
from scipy import stats

from rlflow.flow.grid import Shifted, Uniform
from rlflow.flow.steps import (
    All,
    AllButLast,
    Fraction,
    LastN,
    NoSteps,
    OneRandom,
    Plan,
    RandomWindow,
    Steps,
    Window,
    deterministic,
)

K = 25
GRID = Shifted(3.0)(K)
ROWS = torch.arange(12)
WINDOWS = [
    Window(),
    Window(strategy="random"),
    Window(strategy="decay"),
    Window(strategy="exp_decay"),
    Window(roll_back=False),
    Window(stride=3, every=7),
    Window(stride=0),
    Window(size=1, every=1, skip_last=0),
    Window(compress=0.4),
    Window(stride=0, compress=0.2),
    Window(strategy="random", every=1, compress=0.2, skip_last=0),
]
EVERY = [
    NoSteps(),
    All(),
    AllButLast(),
    AllButLast(3),
    LastN(4),
    LastN(2, skip_last=1),
    *WINDOWS,
    RandomWindow(),
    RandomWindow(2, stop=9),
    OneRandom(),
    OneRandom(skip_last=0),
    Fraction(),
    Fraction(0.01, skip_last=4),
]


def scored_steps(plan: Plan) -> list[int]:
    return plan.scored.nonzero()[:, 0].tolist()


def same(a: Plan, b: Plan) -> bool:
    return torch.equal(a.t, b.t) and torch.equal(a.scored, b.scored) and torch.equal(a.noisy, b.noisy)


@pytest.mark.parametrize("steps", EVERY, ids=repr)
def test_a_plan_is_well_formed_at_every_iteration(steps):
    """Scored steps are noisy, equally many in every row, among the possible ones; the grid runs strictly 0 to 1."""
    possible = set(steps.possible(K))
    num = steps(0, GRID, ROWS).num_scored
    for iteration in range(60):
        plan = steps(iteration, GRID, ROWS)
        assert float(plan.t[0]) == 0.0
        assert float(plan.t[-1]) == 1.0
        assert bool((plan.t.diff() > 0).all())
        assert plan.num_steps == len(plan.t) - 1
        assert plan.num_scored == num
        assert bool((plan.scored.reshape(-1, plan.num_steps).sum(1) == num).all())
        assert bool((plan.noisy | ~plan.scored).all())
        assert set(plan.scored.reshape(-1, plan.num_steps).any(0).nonzero()[:, 0].tolist()) <= possible
    assert num > 0 or isinstance(steps, NoSteps)


@pytest.mark.parametrize("steps", EVERY, ids=repr)
def test_a_plan_is_a_pure_function(steps):
    """Neither the order of calls, nor the global generator, nor the other rows of the batch enter."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plans = {i: steps(i, GRID, ROWS) for i in range(40)}
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert all(same(steps(i, GRID, ROWS), plans[i]) for i in reversed(range(40)))


@pytest.mark.parametrize("steps", [OneRandom(), Fraction()], ids=repr)
def test_choices_of_a_row_do_not_depend_on_the_world_size(steps):
    rows = torch.arange(5000, 5064)
    whole = steps(3, GRID, rows).scored
    for rank in range(4):
        assert torch.equal(steps(3, GRID, rows[rank::4]).scored, whole[rank::4])
        assert torch.equal(steps(3, GRID, rows[16 * rank :][:16]).scored, whole[16 * rank :][:16])
    assert steps(3, GRID, rows[:0]).scored.shape == (0, K)


@pytest.mark.parametrize("steps", [OneRandom(), Fraction()], ids=repr)
def test_choices_differ_by_row_iteration_and_seed(steps):
    a = steps(0, GRID, torch.arange(64)).scored
    assert len(torch.unique(a, dim=0)) > 10
    assert not torch.equal(a, steps(1, GRID, torch.arange(64)).scored)
    assert not torch.equal(a, type(steps)(seed=1)(0, GRID, torch.arange(64)).scored)


class TestPlan:
    def test_deterministic_scores_nothing(self):
        plan = deterministic(GRID)
        assert plan.num_scored == 0
        assert plan.first_noisy() == K
        assert not plan.per_row

    def test_first_noisy_is_that_of_any_row(self):
        noisy = torch.tensor([[False, False, True, False], [False, True, False, False]])
        assert Plan(Uniform()(4), noisy, noisy).first_noisy() == 1
        assert Plan(Uniform()(4), noisy[0], noisy[0]).first_noisy() == 2

    def test_per_row_means_sampled_differently_not_scored_differently(self):
        assert OneRandom()(0, GRID, ROWS).per_row
        assert not Fraction()(0, GRID, ROWS).per_row
        assert not All()(0, GRID, ROWS).per_row


class TestFixed:
    def test_all_scores_every_step(self):
        assert scored_steps(All()(0, GRID, ROWS)) == list(range(K))

    @pytest.mark.parametrize("skip", [0, 1, 2, 24])
    def test_all_but_last_leaves_out_the_end(self, skip):
        assert scored_steps(AllButLast(skip)(0, GRID, ROWS)) == list(range(K - skip))

    def test_last_n_is_the_end_less_skip_last(self):
        assert scored_steps(LastN(4)(0, GRID, ROWS)) == [21, 22, 23, 24]
        assert scored_steps(LastN(4, skip_last=2)(0, GRID, ROWS)) == [19, 20, 21, 22]

    def test_no_steps_is_deployment(self):
        assert same(NoSteps()(3, GRID, ROWS), deterministic(GRID))


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
def test_a_window_is_never_empty_and_never_past_the_end(window):
    """Over 2,000 iterations; the released schedule shrinks at 500 and is empty at 575."""
    for iteration in range(2000):
        start = window.start(iteration, K)
        assert 0 <= start <= K - window.skip_last - window.size
        if iteration % 50 == 0:
            assert scored_steps(window(iteration, GRID, ROWS)) == list(range(start, start + window.size))


class TestWindow:
    def starts(self, window: Window, num: int) -> list[int]:
        return [window.start(i, K) for i in range(num)]

    def test_progressive_moves_one_step_every_25_iterations_over_23_of_25_steps(self):
        starts = self.starts(Window(), 1000)
        assert starts[:500] == [i // 25 for i in range(500)]
        assert starts[500:] == starts[:500]

    def test_without_roll_back_it_stays_at_the_end(self):
        starts = self.starts(Window(roll_back=False), 1000)
        assert starts[:500] == self.starts(Window(), 500)
        assert set(starts[500:]) == {19}

    def test_strides_reach_no_further_than_the_usable_steps(self):
        assert sorted(set(self.starts(Window(stride=4, every=1), 100))) == [0, 4, 8, 12, 16]
        assert Window(stride=4).possible(K) == range(20)

    def test_stride_0_is_frozen(self):
        assert set(self.starts(Window(stride=0, every=1), 300)) == {0}
        assert Window(stride=0).possible(K) == range(4)

    def intervals(self, window: Window) -> list[int]:
        """How long the window rests at each start during the first pass."""
        starts = self.starts(window, 2000)
        first_pass = starts[: next(i for i in range(1, 2000) if starts[i] < starts[i - 1])]
        return [first_pass.count(s) for s in range(20)]

    def test_decay_falls_linearly_with_the_start_of_the_window(self):
        """int(I (1 - p) + p (I // 4)), p = s / 25, I = 25: by hand at s = 0, 1, 5, 19."""
        intervals = self.intervals(Window(strategy="decay"))
        assert [intervals[s] for s in (0, 1, 5, 19)] == [25, 24, 21, 10]
        assert intervals == [int(25 * (1 - s / 25) + s / 25 * 6) for s in range(20)]

    def test_exp_decay_rests_long_up_to_13_then_falls(self):
        """ceil(25 exp(-0.1 relu(s - 13)))."""
        assert self.intervals(Window(strategy="exp_decay")) == [25] * 14 + [23, 21, 19, 17, 16, 14]

    def test_random_holds_for_every_iterations_and_visits_every_start(self):
        starts = self.starts(Window(strategy="random", every=5), 2000)
        assert all(len(set(starts[i : i + 5])) == 1 for i in range(0, 2000, 5))
        counts = torch.bincount(torch.tensor(starts[::5]), minlength=20)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3

    def test_random_depends_on_its_seed_only(self):
        a, b = (self.starts(Window(strategy="random", every=1, seed=s), 50) for s in (0, 1))
        assert a != b

    def test_the_window_keeps_its_grid(self):
        assert torch.equal(Window()(77, GRID, ROWS).t, GRID)


class TestFlash:
    """MixGRPO-Flash: after the window max(1, int((K - last) ratio) - 1) steps, ending at the data."""

    @pytest.mark.parametrize(("compress", "steps"), [(0.4, 11), (0.2, 7)])
    def test_published_number_of_steps_of_the_first_window(self, compress, steps):
        assert Window(compress=compress)(0, GRID, ROWS).num_steps == steps

    @pytest.mark.parametrize("compress", [0.2, 0.4, 0.7, 1.0])
    @pytest.mark.parametrize("skip_last", [0, 2])
    def test_every_position_ends_at_the_data_and_keeps_the_window(self, compress, skip_last):
        window = Window(every=1, compress=compress, skip_last=skip_last)
        for start in range(K - skip_last - 4 + 1):
            plan, last = window(start, GRID, ROWS), start + 3
            assert scored_steps(plan) == list(range(start, start + 4))
            assert torch.equal(plan.t[: last + 2], GRID[: last + 2])
            assert bool((plan.t.diff() > 0).all())
            assert float(plan.t[-1]) == 1.0
            left = K - 1 - last
            after = min(left, max(1, int((K - last) * compress) - 1))
            assert plan.num_steps == last + 1 + after

    @pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 12.0])
    @pytest.mark.parametrize("start", [0, 7, 19])
    def test_steps_after_the_window_are_the_shift_of_even_ones(self, shift, start):
        """The release: sigma = shift(linspace(1 - (last + 1) / K, 0, int((K - last) compress)))."""
        plan = Window(compress=0.4, every=1)(start, Shifted(shift)(K), ROWS)
        last = start + 3
        sigma = torch.linspace(1 - (last + 1) / K, 0, max(2, int((K - last) * 0.4)), dtype=torch.float64)
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        torch.testing.assert_close(plan.t[last + 1 :], 1 - sigma, rtol=0, atol=1e-14)

    def test_compress_1_is_the_whole_grid(self):
        for iteration in range(0, 500, 25):
            plan = Window(compress=1.0)(iteration, GRID, ROWS)
            torch.testing.assert_close(plan.t, GRID, rtol=0, atol=1e-15)


class TestRandomWindow:
    def test_covers_every_start_of_its_range_equally(self):
        starts = [scored_steps(RandomWindow(3, stop=8)(i, GRID, ROWS))[0] for i in range(1200)]
        counts = torch.bincount(torch.tensor(starts))
        assert len(counts) == 6
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3

    def test_default_range_is_the_first_half(self):
        assert RandomWindow(3).possible(10) == range(5)
        assert RandomWindow(3).possible(4) == range(3)

    def test_changes_from_iteration_to_iteration(self):
        """The released one is reseeded at every call and never moves."""
        assert len({scored_steps(RandomWindow()(i, GRID, ROWS))[0] for i in range(20)}) > 3


class TestOneRandom:
    @pytest.mark.parametrize("skip_last", [0, 1, 3])
    def test_one_step_per_row_uniform_over_the_usable_ones(self, skip_last):
        plan = OneRandom(skip_last)(0, Uniform()(8), torch.arange(4000))
        assert plan.num_scored == 1
        assert torch.equal(plan.scored, plan.noisy)
        counts = plan.scored.sum(0)[: 8 - skip_last]
        assert int(counts.sum()) == 4000
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3

    def test_one_row_over_iterations_is_uniform_too(self):
        chosen = [int(OneRandom(0)(i, Uniform()(5), torch.tensor([77])).scored.nonzero()[0, 1]) for i in range(1000)]
        assert stats.chisquare(torch.bincount(torch.tensor(chosen), minlength=5).numpy()).pvalue > 1e-3


class TestFraction:
    @pytest.mark.parametrize(("num_steps", "fraction"), [(16, 0.6), (25, 0.6), (6, 0.6), (2, 0.6), (10, 1.0)])
    def test_every_usable_step_is_noisy_and_a_share_of_them_scored(self, num_steps, fraction):
        plan = Fraction(fraction)(0, Uniform()(num_steps), ROWS)
        usable = num_steps - 1
        assert plan.noisy.tolist() == [True] * usable + [False]
        assert plan.num_scored == max(1, math.floor(fraction * usable + 1e-9))
        assert not bool(plan.scored[:, -1].any())

    def test_every_step_is_scored_equally_often(self):
        plan = Fraction(0.5)(0, Uniform()(9), torch.arange(4000))
        share = plan.scored[:, :8].double().mean(0)
        assert float((share - 0.5).abs().max()) < 4 * 0.5 / 4000**0.5


@pytest.mark.parametrize("steps", [OneRandom(), *WINDOWS[:3]], ids=repr)
def test_only_rows_that_differ_need_a_one_call_solver(steps: Steps):
    assert steps.mixed_rows == steps(0, GRID, ROWS).per_row


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Window(size=0), "size >= 1"),
        (lambda: Window(every=0), "every >= 1"),
        (lambda: Window(stride=-1), "stride >= 0"),
        (lambda: Window(compress=0.0), "compress"),
        (lambda: Window(compress=1.5), "compress"),
        (lambda: Window(skip_last=-1).possible(10), "skip_last >= 0"),
        (lambda: Window(size=9)(0, Uniform()(10), ROWS), "window needs 9 usable steps.*leave 8"),
        (lambda: AllButLast(10).possible(10), "all_but_last needs 1 usable"),
        (lambda: AllButLast(-1).possible(10), "skip_last >= 0"),
        (lambda: LastN(0), "n >= 1"),
        (lambda: LastN(11).possible(10), "last_n needs 11"),
        (lambda: RandomWindow(0), "size >= 1"),
        (lambda: RandomWindow(4, stop=3).possible(10), "does not fit"),
        (lambda: RandomWindow(4).possible(3), "does not fit"),
        (lambda: RandomWindow(2, stop=11).possible(10), "does not fit"),
        (lambda: OneRandom(skip_last=4).possible(4), "one_random needs 1"),
        (lambda: Fraction(0.0), "fraction"),
        (lambda: Fraction(1.1), "fraction"),
    ],
)
def test_a_choice_that_cannot_be_met_is_an_error(make, match):
    with pytest.raises(ValueError, match=match):
        make()
