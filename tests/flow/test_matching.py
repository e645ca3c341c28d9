"""Flow matching: its optimum is the conditional expectation, and couplings keep the marginals."""

import pytest
import torch

from rlflow.flow.field import VelocityField
from rlflow.flow.matching import cfm_loss, independent, minibatch_ot
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
