"""Time grids run strictly from 0 (noise) to 1 (data) and agree with the published sigma forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlflow.flow.grid import FromSigmas, Shifted, Sigmoid, Uniform, between, check_grid, logit_normal
from rlflow.flow.noise import generator

GRIDS = [Uniform(), Shifted(3.0), Shifted(0.2), Shifted(12.0), Sigmoid(4.0), Sigmoid(0.01), Sigmoid(20.0)]


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 40, 1000])
def test_runs_strictly_from_exactly_0_to_exactly_1(grid, num_steps):
    t = grid(num_steps)
    assert t.shape == (num_steps + 1,)
    assert t.dtype == torch.float64
    assert float(t[0]) == 0.0
    assert float(t[-1]) == 1.0
    assert bool((t.diff() > 0).all())
    check_grid(t)


@given(shift=st.floats(1e-3, 1e3), num_steps=st.integers(1, 60))
def test_any_shift_ends_exactly_at_the_data(shift, num_steps):
    check_grid(Shifted(shift)(num_steps))


@pytest.mark.parametrize("shift", [0.3, 1.0, 1.15, 3.0, 7.0])
def test_shift_is_sd3s_in_sigma(shift):
    sigma = 1 - Uniform()(25)
    expected = shift * sigma / (1 + (shift - 1) * sigma)
    torch.testing.assert_close(1 - Shifted(shift)(25), expected, rtol=0, atol=1e-14)


def test_shift_of_one_is_uniform():
    torch.testing.assert_close(Shifted(1.0)(10), Uniform()(10), rtol=0, atol=1e-15)


def test_a_larger_shift_stays_longer_near_the_noise():
    assert bool((Shifted(3.0)(10)[1:-1] < Uniform()(10)[1:-1]).all())


@pytest.mark.parametrize("scale", [0.5, 4.0, 12.0])
def test_sigmoid_is_symmetric_and_dense_at_both_ends(scale):
    t = Sigmoid(scale)(11)
    torch.testing.assert_close(t + t.flip(0), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-14)
    steps = t.diff()
    assert float(steps[0]) < float(steps[5])
    assert float(steps[-1]) < float(steps[5])


def test_sigmoid_of_a_tiny_scale_is_uniform():
    torch.testing.assert_close(Sigmoid(1e-4)(10), Uniform()(10), rtol=0, atol=1e-8)


def test_from_sigmas_is_one_minus_sigma():
    sigmas = [1.0, 0.9, 0.35, 0.1, 0.0]
    assert torch.equal(FromSigmas(sigmas)(4), 1 - torch.tensor(sigmas, dtype=torch.float64))


@pytest.mark.parametrize(
    "sigmas",
    [
        [0.9997, 0.5, 0.0],  # starts beside the noise: the special case t = 0 of FlowSDE would miss it
        [1.0, 0.5, 0.01],  # stops before the data
        [1.0, 0.5, 0.5, 0.0],
        [0.0, 0.5, 1.0],
        [1.0, 1.2, 0.0],
        [1.0],
    ],
)
def test_from_sigmas_refuses_what_is_no_grid(sigmas):
    with pytest.raises(ValueError, match="time grid"):
        FromSigmas(sigmas)


def test_from_sigmas_refuses_another_number_of_steps():
    with pytest.raises(ValueError, match="grid of 2 steps, not 3"):
        FromSigmas([1.0, 0.5, 0.0])(3)


@pytest.mark.parametrize("make", [lambda: Shifted(0.0), lambda: Shifted(-1.0), lambda: Sigmoid(0.0)])
def test_a_parameter_that_gives_no_grid_is_an_error(make):
    with pytest.raises(ValueError, match="must be positive"):
        make()


@pytest.mark.parametrize("grid", [Uniform(), Shifted(), Sigmoid()], ids=repr)
def test_no_steps_is_an_error(grid):
    with pytest.raises(ValueError, match="num_steps"):
        grid(0)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5), (-0.5, 1.5)])
def test_logit_normal_times_have_its_quantiles(mean, std):
    t = logit_normal(20_000, generator("t"), mean, std)
    assert float(t.min()) > 0
    assert float(t.max()) < 1
    assert stats.kstest(torch.logit(t.double()).numpy(), "norm", args=(mean, std)).pvalue > 1e-3
    assert float(t.median()) == pytest.approx(1 / (1 + math.exp(-mean)), abs=0.01)


def test_logit_normal_is_a_function_of_its_generator():
    assert torch.equal(logit_normal(5, generator("t", 1)), logit_normal(5, generator("t", 1)))


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_between_meets_the_grid_and_rises_strictly(grid):
    t = grid(9)
    fine = between(t, torch.linspace(1, 9, 81, dtype=torch.float64))
    torch.testing.assert_close(fine[::10], t[1:], rtol=0, atol=1e-14)
    assert bool((fine.diff() > 0).all())
    assert float(fine[-1]) == 1.0


@pytest.mark.parametrize("shift", [0.2, 1.0, 3.0])
def test_between_a_shifted_grid_is_the_same_shift(shift):
    """A grid of six times as many steps, in all intervals but the first."""
    fine = between(Shifted(shift)(4), torch.linspace(1, 4, 19, dtype=torch.float64))
    torch.testing.assert_close(fine, Shifted(shift)(24)[6:], rtol=0, atol=1e-14)
