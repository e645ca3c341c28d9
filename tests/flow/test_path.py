"""The straight path: what a velocity implies, checked on a Gaussian mixture whose density is known."""

import math

import pytest
import torch
from torch import Tensor

from rlflow.flow import path

MEANS = torch.tensor([[-1.0, 0.5], [1.5, -0.3], [0.2, 2.0]], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.7, 0.05], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def log_density(x: Tensor, t: Tensor) -> Tensor:
    """log p_t(x) (N,) of the path whose data law is the mixture: component i is N(t mean_i, (1-t)^2 + t^2 std_i^2)."""
    var = (1 - t)[:, None] ** 2 + (t[:, None] * STDS) ** 2
    square = (x[:, None] - t[:, None, None] * MEANS).square().sum(-1)
    log_component = -0.5 * square / var - x.shape[1] / 2 * torch.log(2 * math.pi * var)
    return torch.logsumexp(WEIGHTS.log() + log_component, -1)


def posterior_means(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(E[x_0 | x_t], E[x_1 | x_t]) by Gaussian conditioning inside each component, then Bayes over components."""
    t = t[:, None, None]
    var = (1 - t) ** 2 + (t * STDS[:, None]) ** 2
    gap = x[:, None] - t * MEANS
    log_weight = WEIGHTS.log() - 0.5 * gap.square().sum(-1) / var[..., 0] - x.shape[1] / 2 * var[..., 0].log()
    weight = torch.softmax(log_weight, -1)[..., None]
    x_0 = weight * (1 - t) / var * gap
    x_1 = weight * (MEANS + t * STDS[:, None] ** 2 / var * gap)
    return x_0.sum(1), x_1.sum(1)


def points(num: int = 40) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    t = torch.linspace(0, 0.95, num, dtype=torch.float64)
    return 2 * torch.randn(num, 2, generator=g, dtype=torch.float64), t


def test_velocity_of_a_pair_gives_back_the_pair():
    x_0, x_1 = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64).unbind(0)
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    x = path.interpolate(x_0, x_1, t)
    torch.testing.assert_close(path.data(x, x_1 - x_0, t), x_1, rtol=0, atol=1e-14)
    torch.testing.assert_close(path.noise(x, x_1 - x_0, t), x_0, rtol=0, atol=1e-14)
    assert torch.equal(x[0], x_0[0])
    assert torch.equal(x[-1], x_1[-1])


def test_score_is_the_gradient_of_the_log_density():
    x, t = points()
    x_0, x_1 = posterior_means(x, t)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(log_density(x, t).sum(), x)
    torch.testing.assert_close(path.score(x.detach(), x_1 - x_0, t), gradient, rtol=1e-10, atol=1e-10)


def test_data_and_noise_are_the_posterior_means():
    x, t = points()
    x_0, x_1 = posterior_means(x, t)
    v = x_1 - x_0
    torch.testing.assert_close(path.data(x, v, t), x_1, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path.noise(x, v, t), x_0, rtol=1e-12, atol=1e-12)


def test_score_is_minus_the_noise_over_its_share():
    x, t = points()
    v = torch.randn_like(x)
    expected = -path.noise(x, v, t) / (1 - t)[:, None]
    torch.testing.assert_close(path.score(x, v, t), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_at_least_float_promotes_half_precision_only(given, computed):
    assert path.at_least_float(torch.zeros(2, dtype=given)).dtype == computed


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 3, 4, 4)])
def test_expand_broadcasts_over_rows(shape):
    t = torch.arange(5.0)
    product = path.expand(t, torch.ones(shape)) * torch.ones(shape)
    assert product.shape == shape
    assert torch.equal(product.reshape(5, -1)[:, 0], t)
