"""Diffusion models in flow coordinates: the same model, DDIM, the law of the samples, the optimum of matching losses."""

import pytest
import torch
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.flow.grid import FromScheduler, Uniform
from rlflow.flow.kernels import Ancestral, FlowSDE
from rlflow.flow.marginal import MEAN, STD, end_moments, exact_velocity
from rlflow.flow.path import at_start, interpolate
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import Euler
from rlflow.flow.steps import AllButLast, deterministic
from rlflow.models.vp import Table
from rlflow.types import Cond

SQUARES = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()).cumprod(0)
"""alpha^2 of Stable Diffusion's table."""
PREDICTIONS = ["epsilon", "v_prediction"]


def predicted(kind: str, alpha: Tensor, sigma: Tensor, x_0: Tensor, x_1: Tensor) -> Tensor:
    """What a network of this kind says where it takes the noise for x_0 and the data for x_1."""
    return x_0 if kind == "epsilon" else alpha * x_0 - sigma * x_1


def of_index(index: Tensor) -> tuple[Tensor, Tensor]:
    """alpha, sigma (N, 1) of whole indices."""
    square = SQUARES[index.long()].unsqueeze(-1)
    return square.sqrt(), (1 - square).sqrt()


def gaussian(kind: str):
    """The exact network of data N(MEAN, STD^2), asked at entries of the table."""

    def network(z: Tensor, index: Tensor) -> Tensor:
        alpha, sigma = of_index(index)
        x_1 = MEAN + alpha * STD**2 * (z - alpha * MEAN) / (alpha.square() * STD**2 + sigma.square())
        return predicted(kind, alpha, sigma, (z - alpha * x_1) / sigma, x_1)

    return network


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_network_that_knows_the_data_gives_the_velocity_of_the_path(kind):
    table = Table(SQUARES, kind)
    x_0, x_1 = torch.randn(2, 4, 3, dtype=torch.float64)
    t = table.times[[999, 500, 20, 0]]

    def network(z: Tensor, index: Tensor) -> Tensor:
        alpha, sigma = of_index(index)
        torch.testing.assert_close(z, alpha * x_1 + sigma * x_0, rtol=1e-9, atol=1e-9)
        return predicted(kind, alpha, sigma, x_0, x_1)

    torch.testing.assert_close(table.velocity(interpolate(x_0, x_1, t), t, network), x_1 - x_0, rtol=1e-9, atol=1e-9)


def test_the_kinds_of_prediction_of_one_model_agree_and_are_the_exact_velocity():
    x = torch.linspace(-3, 4, 1000, dtype=torch.float64).unsqueeze(-1)
    t = Table(SQUARES, "epsilon").times
    exact = exact_velocity(x, t, t, Cond({"pooled": x}))
    for kind in PREDICTIONS:
        torch.testing.assert_close(Table(SQUARES, kind).velocity(x, t, gaussian(kind)), exact, rtol=1e-9, atol=1e-9)


class Toy(VelocityField):
    """A nonlinear network in flow coordinates, whose own grid are entries of the table."""

    event_shape, num_features = (3,), 1

    def __init__(self, kind: str, entries: Tensor):
        super().__init__()
        self.table, self.entries = Table(SQUARES, kind), entries
        self.weight = torch.nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        self.first_time = self.table.first_time

    def network(self, z: Tensor, index: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight + (index / 300).sin().unsqueeze(-1))

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        return self.table.velocity(x, t, self.network)

    def times(self, num_steps: int) -> Tensor:
        return torch.cat([self.table.times[self.entries], torch.ones(1)])


@torch.no_grad()
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [5, 20])
def test_an_euler_step_is_a_step_of_ddim(kind, num_steps):
    entries = torch.arange(num_steps).flip(0) * (1000 // num_steps) + 1
    field = Toy(kind, entries)
    policy = FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=num_steps)
    z = noise = torch.randn(6, 3, dtype=torch.float64)
    ours = policy.sample(Cond({"pooled": torch.zeros(6, 1)}), x_0=noise).final
    for index, following in zip(entries, [*entries[1:], None], strict=True):
        alpha, sigma = of_index(index.expand(6))
        after = (torch.ones(1), torch.zeros(1)) if following is None else of_index(following.expand(6))
        x_0, x_1 = field.table.parts(z, field.network(z, index.expand(6).double()), alpha, sigma)
        z = after[0] * x_1 + after[1] * x_0
    assert (ours - z).norm() / z.norm() < 1e-6


@pytest.mark.parametrize("kernel", [FlowSDE(), Ancestral()], ids=["flow_sde", "ancestral"])
def test_a_noisy_chain_from_where_the_table_ends_has_the_law_of_the_data(kernel):
    """Exact, without sampling; the velocity is the table's, by the test above. The start lacks the data's mean, of
    which a noisy chain keeps less than the ODE."""
    entries = torch.arange(250).flip(0) * 4 + 3
    grid = torch.cat([Table(SQUARES, "epsilon").times[entries], torch.ones(1)])
    plan = AllButLast()(0, grid, torch.zeros(1, dtype=torch.long))
    mean, std = end_moments(kernel.double(), Euler(), plan, (1,), 1)
    assert abs(mean - MEAN) < 0.03
    assert abs(std - STD) < 0.02
    kept, _ = end_moments(kernel.double(), Euler(), deterministic(grid), (1,), 1)
    assert abs(kept - MEAN) > abs(mean - MEAN)


def test_the_first_noise_has_the_spread_of_data_of_unit_variance():
    """At t = 0 it is the noise as drawn, bit for bit; and so it is in the model's own coordinates, at any time."""
    noise = torch.randn(50)
    assert at_start(noise, 0.0) is noise
    t = float(Table(SQUARES, "epsilon").times[951])
    spread = at_start(torch.ones(1, dtype=torch.float64), t)
    alpha, sigma = of_index(torch.tensor([951]))
    torch.testing.assert_close(spread * (alpha + sigma).squeeze(), torch.ones(1, dtype=torch.float64))
    ones = torch.ones(4, 3, dtype=torch.float64)
    field = Toy("epsilon", torch.tensor([951, 1]))
    policy = FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=2)
    with torch.no_grad():
        chain = policy.sample(Cond({"pooled": torch.zeros(4, 1)}), x_0=ones, keep_path=True)
    torch.testing.assert_close(chain.path[:, 0], ones * spread)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_matching_loss_has_no_gradient_at_the_converted_optimum(kind):
    """Of any change of the velocity, in the mean; and it has one where the velocity is a little off."""
    table, n = Table(SQUARES, kind), 200_000
    g = torch.Generator().manual_seed(0)
    entries = torch.randint(0, 1000, (n,), generator=g)
    t = table.times[entries]
    x_0, x_1 = torch.randn(2, n, 1, generator=g, dtype=torch.float64)
    x_1 = MEAN + STD * x_1
    x = interpolate(x_0, x_1, t)
    error = table.velocity(x, t, gaussian(kind)) - (x_1 - x_0)
    for change in (torch.ones_like(x), x, torch.sin(3 * x) * t.unsqueeze(-1)):
        gradient = error * change
        assert abs(float(gradient.mean())) < 4 * float(gradient.std()) / n**0.5
    assert float(((error + 0.05) * torch.ones_like(x)).mean()) > 0.04


def test_indices_are_whole_at_the_tables_times_and_end_where_it_ends():
    table = Table(SQUARES, "epsilon")
    assert torch.equal(table.index(table.times.float()), torch.arange(1000.0))
    assert torch.equal(table.index(1 - (1 - table.times.float())), torch.arange(1000.0))
    middle = (table.times[:-1] + table.times[1:]) / 2
    torch.testing.assert_close(table.index(middle), torch.arange(999) + 0.5)
    assert table.index(torch.tensor([0.0, 1.0])).tolist() == [999, 0]


def test_what_is_no_table_is_refused():
    with pytest.raises(ValueError, match="must fall from data to noise"):
        Table(SQUARES.flip(0), "epsilon")
    with pytest.raises(ValueError, match="predicts 'sample', and one of"):
        Table(SQUARES, "sample")
    ends = torch.cat([SQUARES, torch.zeros(1)])
    with pytest.raises(ValueError, match="ends in pure noise, where predicted noise says nothing"):
        Table(ends, "epsilon")
    assert Table(ends, "v_prediction").first_time == 0


def test_a_grid_that_starts_before_the_table_ends_is_refused():
    field = Toy("epsilon", torch.tensor([951, 1]))
    policy = FlowPolicy(field, FlowSDE(), grid=Uniform(), num_steps=2)
    for ask in (policy.plan, lambda: policy.check_steps(AllButLast())):
        with pytest.raises(ValueError, match=r"policy.grid starts at 0, and this model at 0.064: use grid=scheduler"):
            ask()
    late = FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=2)
    assert deterministic(late.times(2)).t[0] == field.table.times[951]
