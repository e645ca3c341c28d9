"""The step distribution against torch.distributions, in every shape and precision it is used in."""

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from rlflow.flow.gaussian import Gaussian, reduce_events


def pair(*std_shape: int) -> tuple[Gaussian, Gaussian, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    mean, other, x = torch.randn(3, 5, 3, 4, generator=g, dtype=torch.float64).unbind(0)
    std, other_std = (torch.rand(2, *std_shape, generator=g, dtype=torch.float64) + 0.1).unbind(0)
    return Gaussian(mean, std), Gaussian(other, other_std), x


def as_torch(dist: Gaussian) -> Normal:
    return Normal(dist.mean, dist.std.expand_as(dist.mean))


@pytest.mark.parametrize("std_shape", [(5, 1, 1), (5, 3, 4), (5, 1, 4)])
@pytest.mark.parametrize("batch_dims", [1, 2, 3])
class TestAgainstTorch:
    def independent(self, dist: Gaussian, batch_dims: int) -> Independent:
        return Independent(as_torch(dist), 3 - batch_dims)

    def size(self, batch_dims: int) -> int:
        return {1: 12, 2: 4, 3: 1}[batch_dims]

    def check(self, ours, theirs, batch_dims):
        torch.testing.assert_close(ours("sum", batch_dims), theirs, rtol=1e-12, atol=1e-12)
        mean = theirs / self.size(batch_dims)
        torch.testing.assert_close(ours("mean", batch_dims), mean, rtol=1e-12, atol=1e-12)

    def test_log_prob(self, std_shape, batch_dims):
        dist, _, x = pair(*std_shape)
        expected = self.independent(dist, batch_dims).log_prob(x)
        self.check(lambda r, b: dist.log_prob(x, r, b), expected, batch_dims)

    def test_kl_of_unequal_std(self, std_shape, batch_dims):
        dist, other, _ = pair(*std_shape)
        expected = kl_divergence(self.independent(dist, batch_dims), self.independent(other, batch_dims))
        self.check(lambda r, b: dist.kl(other, r, b), expected, batch_dims)

    def test_entropy(self, std_shape, batch_dims):
        dist, _, _ = pair(*std_shape)
        self.check(dist.entropy, self.independent(dist, batch_dims).entropy(), batch_dims)


def test_kl_of_equal_std_is_the_squared_distance_of_the_means():
    dist, other, _ = pair(5, 1, 1)
    expected = ((dist.mean - other.mean) ** 2 / (2 * dist.std**2)).mean((1, 2))
    torch.testing.assert_close(dist.kl(Gaussian(other.mean, dist.std), "mean"), expected)
    assert dist.kl(dist, "sum").abs().max() == 0


def test_kl_is_not_symmetric_and_measures_from_the_first():
    wide, narrow = (Gaussian(torch.zeros(1, 1), torch.full((1, 1), s)) for s in (2.0, 0.5))
    assert float(wide.kl(narrow, "sum")) > float(narrow.kl(wide, "sum")) > 0


def test_sample_is_mean_plus_std_times_noise_and_carries_gradients():
    dist, _, z = pair(5, 1, 1)
    mean, std = dist.mean.requires_grad_(True), dist.std.requires_grad_(True)
    Gaussian(mean, std).sample(z).sum().backward()
    assert torch.equal(Gaussian(mean, std).sample(z), mean + std * z)
    assert torch.equal(mean.grad, torch.ones_like(mean))
    torch.testing.assert_close(std.grad, z.sum((1, 2), keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted_before_any_arithmetic(dtype):
    dist, other, x = pair(5, 1, 1)
    half = [Gaussian(d.mean.to(dtype), d.std.to(dtype)) for d in (dist, other)]
    exact = [Gaussian(d.mean.to(dtype).double(), d.std.to(dtype).double()) for d in (dist, other)]
    x = x.to(dtype)
    for ours, theirs in [
        (half[0].log_prob(x, "sum"), exact[0].log_prob(x.double(), "sum")),
        (half[0].kl(half[1], "sum"), exact[0].kl(exact[1], "sum")),
        (half[0].entropy("sum"), exact[0].entropy("sum")),
    ]:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_float64_stays_float64():
    dist, other, x = pair(5, 1, 1)
    assert {v.dtype for v in (dist.log_prob(x, "sum"), dist.kl(other, "sum"), dist.entropy("sum"))} == {torch.float64}


def test_reduce_events_of_scalars_keeps_them():
    value = torch.arange(4.0)
    assert torch.equal(reduce_events(value, "sum"), value)
    assert torch.equal(reduce_events(value, "mean"), value)
