"""A density: it integrates to 1, its map inverts, its volume is the determinant, and it fits what it is shown."""

import math

import pytest
import torch
from torch import Tensor, nn

from rlflow.rl.imitation.coupling import CouplingDensity


def shaken(num: int, layers: int = 4, seed: int = 0) -> CouplingDensity:
    """One that is not the identity anywhere."""
    torch.manual_seed(seed)
    made = CouplingDensity(num, layers, width=16).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def grid(num: int, reach: float, dims: int) -> tuple[Tensor, float]:
    """(points (num^dims, dims), volume of a cell)."""
    line = torch.linspace(-reach, reach, num, dtype=torch.float64)
    return torch.cartesian_prod(*[line] * dims).view(-1, dims), float(line[1] - line[0]) ** dims


@pytest.mark.parametrize("dims", [1, 2])
def test_integrates_to_one(dims: int) -> None:
    points, cell = grid(401 if dims == 2 else 4001, 12.0, dims)
    with torch.no_grad():
        total = float(shaken(dims).log_prob(points).exp().sum() * cell)
    assert total == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("num", [1, 2, 5])
def test_the_map_inverts_and_its_volume_is_the_determinant(num: int) -> None:
    density, x = shaken(num), torch.randn(4, num, dtype=torch.float64)
    z, log_det = density.latent(x)
    torch.testing.assert_close(density.inverse(z), x)
    for row in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda v: density.latent(v[None])[0][0], x[row])
        torch.testing.assert_close(log_det[row], torch.linalg.slogdet(jacobian).logabsdet)


def test_is_the_standard_normal_at_first_and_every_number_can_move() -> None:
    density, x = CouplingDensity(3), torch.randn(5, 3)
    expected = -(x.square().sum(1) + 3 * math.log(2 * math.pi)) / 2
    torch.testing.assert_close(density.log_prob(x), expected)
    assert torch.stack([layer.moved for layer in density.layers]).any(0).all()


def test_samples_follow_the_density() -> None:
    """Cross-entropy of its own samples is its entropy: the mean latent square is 1."""
    density = shaken(3)
    with torch.no_grad():
        z, _ = density.latent(density.sample(4000, torch.Generator().manual_seed(0)).double())
    assert float(z.square().mean()) == pytest.approx(1, abs=0.05)
