"""Flow matching: its optimum is the conditional expectation, and couplings keep the marginals."""

import pytest
import torch

from rlflow.flow.field import VelocityField
from rlflow.flow.matching import ShortcutLoss, cfm_loss, independent, minibatch_ot
from rlflow.types import Cond

MEAN, SCALE = 1.5, 0.4
"""Data N(MEAN, SCALE^2 I) against standard normal noise."""


class Affine(VelocityField):
    """v = a x + b at one time, with trainable numbers."""

    event_shape = (2,)

    def __init__(self, a: float = 0.0, b: float = 0.0) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def forward(self, x, t, dt, cond):
        assert (dt == 0).all()
        return self.a * x + self.b


def optimum(t: float) -> tuple[float, float]:
    """a, b of E[x_1 - x_0 | x_t = x] for independent Gaussians."""
    variance = (1 - t) ** 2 + t**2 * SCALE**2
    a = (t * SCALE**2 - (1 - t)) / variance
    return a, MEAN - a * t * MEAN


def draw(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x_0, z = torch.randn((2, num, 2), generator=rng, dtype=torch.float64)
    return x_0, MEAN + SCALE * z


def cond(num: int) -> Cond:
    return Cond({"pooled": torch.zeros(num, 1)})


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 1.0])
def test_optimum_is_the_conditional_expectation(t):
    """The gradient of the loss vanishes at the exact velocity and nowhere near it."""
    num = 200_000
    x_0, x_1 = draw(num)
    time = torch.full((num,), t, dtype=torch.float64)
    a, b = optimum(t)
    for shift, stationary in ((0.0, True), (0.2, False)):
        field = Affine(a + shift, b + shift)
        cfm_loss(field, x_1, cond(num), x_0, time).mean().backward()
        size = abs(field.a.grad.item()) + abs(field.b.grad.item())
        assert (size < 0.03) == stationary


def test_loss_is_zero_for_the_velocity_of_the_path():
    """With one data point the straight path's velocity (x_1 - x) / (1 - t) is known exactly."""

    class Exact(VelocityField):
        def forward(self, x, t, dt, cond):
            return (1.5 - x) / (1 - t[:, None])

    x_0, _ = draw(8)
    loss = cfm_loss(Exact(), torch.full_like(x_0, 1.5), cond(8), x_0, torch.linspace(0, 0.9, 8).double())
    assert loss.shape == (8,)
    assert loss.max() < 1e-20


def test_loss_is_one_number_per_row_a_mean_over_the_event():
    x_0, x_1 = draw(5)
    loss = cfm_loss(Affine(), x_1, cond(5), x_0, torch.rand(5).double())
    torch.testing.assert_close(loss, (x_1 - x_0).square().mean(1))


def test_half_precision_data_is_matched_in_single():
    x_0, x_1 = (x.bfloat16() for x in draw(5))
    assert cfm_loss(Affine().float(), x_1, cond(5), x_0, torch.rand(5)).dtype == torch.float32


def transport(x_0: torch.Tensor, x_1: torch.Tensor) -> float:
    return (x_1 - x_0).square().sum().item()


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_optimal_coupling_permutes_the_noise_and_lowers_the_cost(shape):
    torch.manual_seed(0)
    x_0, x_1 = torch.randn(2, 40, *shape)
    coupled = minibatch_ot(x_0, x_1)
    key = [tuple(row) for row in x_0.flatten(1).tolist()]
    assert sorted(key) == sorted(tuple(row) for row in coupled.flatten(1).tolist())
    assert transport(coupled, x_1) < transport(x_0, x_1)
    torch.testing.assert_close(independent(x_0, x_1), x_0)


def test_optimal_coupling_is_the_best_of_all_permutations():
    from itertools import permutations

    torch.manual_seed(1)
    for _ in range(10):
        x_0, x_1 = torch.randn(2, 5, 2)
        best = min(transport(x_0[list(order)], x_1) for order in permutations(range(5)))
        assert transport(minibatch_ot(x_0, x_1), x_1) == pytest.approx(best)


def test_optimal_coupling_undoes_a_shuffle():
    """Data that is shuffled noise plus a shift is matched to its own noise."""
    x_0, _ = draw(30)
    order = torch.randperm(30)
    torch.testing.assert_close(minibatch_ot(x_0, x_0[order] + 7), x_0[order])


class Steered(VelocityField):
    """v = rate * x plus a drift; its average over dt is exact when `exact`, else the instantaneous one."""

    event_shape, uses_dt = (2,), True

    def __init__(self, rate: float, drift: float = 0.0, exact: bool = True) -> None:
        super().__init__()
        self.rate, self.exact = torch.nn.Parameter(torch.tensor(rate, dtype=torch.float64)), exact
        self.drift, self.asked = drift, []

    def forward(self, x, t, dt, cond):
        self.asked.append((t, dt))
        small = torch.where(dt > 0, dt, 1)
        growth = torch.where(dt > 0, torch.expm1(self.rate * small) / small, self.rate)
        return x * (growth if self.exact else self.rate.expand(len(x)))[:, None] + self.drift


def euler(field: VelocityField, x: torch.Tensor, num_steps: int) -> torch.Tensor:
    for k in range(num_steps):
        t = torch.full((len(x),), k / num_steps, dtype=x.dtype)
        x = x + field(x, t, torch.full_like(t, 1 / num_steps), cond(len(x))) / num_steps
    return x


def shortcut_errors(field: VelocityField, max_steps: int = 4, num: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the rows of self-consistency, and the step size of each."""
    x_0, x_1 = draw(num)
    loss = ShortcutLoss(max_steps, share=0.75)
    t = torch.rand(num, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = round(0.75 * num)
    return loss(field, x_1, cond(num), x_0, t)[:kept], loss.steps(t[:kept])[0]


class TestShortcut:
    def test_target_is_exact_for_a_straight_field(self):
        """Two halves of a constant velocity are the whole: no error at any size."""
        errors, _ = shortcut_errors(Steered(0.0, drift=1.7))
        assert errors.max() < 1e-28

    def test_exact_averages_have_no_error_but_at_the_smallest_size(self):
        """There the halves are Euler steps of the instantaneous velocity, as is written down."""
        errors, size = shortcut_errors(Steered(0.8))
        assert errors[size > 0.25].max() < 1e-28
        assert errors[size == 0.25].min() > 0

    def test_exact_averages_go_as_far_in_one_step_as_in_many(self):
        x_0, _ = draw(16)
        field = Steered(0.8)
        for num_steps in (1, 2, 4):
            torch.testing.assert_close(euler(field, x_0, num_steps), x_0 * 2.718281828459045**0.8, rtol=1e-12, atol=0)

    def test_instantaneous_velocity_in_place_of_averages_is_seen(self):
        errors, _ = shortcut_errors(Steered(0.8, exact=False))
        assert errors.min() > 0

    @pytest.mark.parametrize("max_steps", [1, 2, 4, 8])
    def test_only_step_sizes_of_inference_are_asked_for(self, max_steps):
        """On their own grid, inside [0, 1]; half of the smallest one as dt = 0."""
        field = Steered(0.8)
        _, size = shortcut_errors(field, max_steps)
        assert sorted(set(size.tolist())) == [1 / k for k in (8, 4, 2, 1) if k <= max_steps]
        (t, dt), (t_2, dt_2), (t_all, dt_all) = field.asked
        assert torch.equal(dt, dt_2)
        assert torch.equal(dt, torch.where(size > 1 / max_steps, size / 2, 0))
        assert torch.equal(t_2, t + size / 2)
        assert torch.equal(t % size, torch.zeros_like(t))
        assert float((t + size).max()) <= 1
        assert torch.equal(dt_all[: len(size)], size)
        assert not dt_all[len(size) :].any()
        assert torch.equal(t_all[: len(size)], t)

    @pytest.mark.parametrize("max_steps", [1, 2, 4, 8])
    def test_a_step_begins_at_the_last_of_its_multiples_not_after_the_time(self, max_steps):
        """Floored, so that each has an equal share of the times; rounded, the first would have half of one."""
        t = torch.linspace(0, 1, 321, dtype=torch.float64)[:-1]
        size, start = ShortcutLoss(max_steps).steps(t)
        assert bool((start <= t).all())
        assert bool((t < start + size).all())

    def test_other_rows_are_flow_matching(self):
        x_0, x_1 = draw(64)
        t = torch.rand(64, dtype=torch.float64)
        field = Steered(0.3)
        matched = cfm_loss(field, x_1, cond(64), x_0, t)
        torch.testing.assert_close(ShortcutLoss()(field, x_1, cond(64), x_0, t)[16:], matched[16:])

    def test_gradient_is_finite_and_only_of_the_big_step(self):
        """Against the gradient by hand, with the target held."""
        x_0, x_1 = draw(64)
        t = torch.linspace(0, 1, 64, dtype=torch.float64)
        field = Steered(0.8, exact=False)
        ShortcutLoss(share=0.5)(field, x_1, cond(64), x_0, t)[:32].mean().backward()
        size, start = ShortcutLoss().steps(t[:32])
        x = (1 - start[:, None]) * x_0[:32] + start[:, None] * x_1[:32]
        target = ShortcutLoss().two_halves(field, x, start, size, cond(32))
        expected = (2 * (field.rate.detach() * x - target) * x).mean()
        torch.testing.assert_close(field.rate.grad, expected)

    def test_refusals(self):
        with pytest.raises(ValueError, match=r"1, 2, 4"):
            ShortcutLoss(max_steps=3)
        with pytest.raises(ValueError, match="share"):
            ShortcutLoss(share=1.0)
        with pytest.raises(ValueError, match="average=True"):
            ShortcutLoss()(Affine(), draw(4)[1], cond(4), draw(4)[0], torch.rand(4))
