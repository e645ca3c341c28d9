"""The density of a noise-free chain: Gaussian where the field is affine, normalised and that of its samples where not."""

import math

import pytest
import torch
from torch import Tensor, nn

from rlflow.doctor.density import euler_log_prob
from rlflow.flow.field import VelocityField
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.models.mlp import MLPField
from rlflow.types import Cond


class Linear(VelocityField):
    """v = (1 + t) A x + b."""

    def __init__(self, matrix: Tensor, shift: Tensor):
        super().__init__()
        self.event_shape, self.num_features = (len(shift),), 1
        self.matrix, self.shift = nn.Parameter(matrix), nn.Parameter(shift)

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        return (1 + t[:, None]) * (x @ self.matrix.T) + self.shift


def nothing(num: int) -> Cond:
    return Cond({"pooled": torch.zeros(num, 1, dtype=torch.float64)})


def test_of_an_affine_chain_is_the_gaussian_it_makes():
    torch.manual_seed(0)
    a, b = 0.4 * torch.randn(3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    policy = FlowPolicy(Linear(a, b), FlowSDE(), num_steps=5).double()
    scale, mean = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for k in range(5):
        step = torch.eye(3, dtype=torch.float64) + 0.2 * (1 + k / 5) * a
        scale, mean = step @ scale, step @ mean + 0.2 * b
    x = torch.randn(7, 3, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(mean, scale @ scale.T).log_prob(x)
    torch.testing.assert_close(euler_log_prob(policy, x, nothing(7)), expected)


def bent() -> FlowPolicy:
    """One dimension, two modes."""
    torch.manual_seed(1)
    field = MLPField(1, (1,), width=16)
    policy = FlowPolicy(field, FlowSDE(), num_steps=4).double()
    with torch.no_grad():
        for p in policy.field.net.parameters():
            p *= 1.5
    return policy


def test_integrates_to_one():
    x = torch.linspace(-8, 8, 1601, dtype=torch.float64)[:, None]
    density = euler_log_prob(bent(), x, nothing(len(x))).exp()
    assert float(torch.trapezoid(density, x[:, 0])) == pytest.approx(1, abs=1e-3)


def test_is_the_change_of_variables_along_the_samples():
    """By autograd through the whole chain, on the samples themselves."""
    policy, cond = bent(), nothing(5)
    x_0 = torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)[:, None].requires_grad_()
    x_1 = policy.sample(cond, x_0=x_0).final
    slope = torch.autograd.grad(x_1.sum(), x_0)[0][:, 0]
    expected = -0.5 * (x_0[:, 0] ** 2 + math.log(2 * math.pi)) - slope.abs().log()
    torch.testing.assert_close(euler_log_prob(policy, x_1.detach(), cond), expected.detach())


def test_a_point_that_no_start_leads_to_has_none():
    """v = -5 x + 3 relu-like kink: the step folds, and some points are out of reach."""

    class Fold(Linear):
        def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
            return x.abs() - x + 0 * self.matrix.sum()  # x + dt v = |x| in one step

    policy = FlowPolicy(Fold(torch.zeros(1, 1), torch.zeros(1)), FlowSDE(), num_steps=1).double()
    found = euler_log_prob(policy, torch.tensor([[-2.0], [2.0]], dtype=torch.float64), nothing(2))
    assert found[0].isnan()
