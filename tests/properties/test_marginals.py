"""The law of the last state under exact velocities, without sampling noise: what each kernel and solver preserves.

Broad data N(2, .5^2): all steps are affine, so mean and variance follow a closed recursion. Two narrow modes (-1 and
1.5, std .05): the law is carried as quantiles, each step convolved with Gaussian quantiles and compressed again.
W1 is the Wasserstein-1 distance to the data law. The numbers are the table of the methods page.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from scipy.special import ndtri
from scipy.stats import foldnorm
from torch import Tensor

from rlflow.flow.gaussian import Gaussian
from rlflow.flow.grid import Shifted, Uniform
from rlflow.flow.kernels import CPS, Ancestral, ConstantSDE, FlowSDE, Kernel, LearnedNoise, Overshoot

Velocity = Callable[[Tensor, float, float], Tensor]
MEAN, STD = 2.0, 0.5
MODES, MODE_STD = torch.tensor([-1.0, 1.5], dtype=torch.float64), 0.05
KERNELS: dict[str, Kernel | None] = {
    "ode": None,
    "flow": FlowSDE(0.7),
    "constant": ConstantSDE(0.3),
    "cps": CPS(0.7),
    "ancestral": Ancestral(0.7 / 2**0.5),
    "overshoot": Overshoot(0.7**2 / 2),
}
# W1 at 10 and 160 steps, broad data; then the same for two narrow modes
TABLE = {
    "ode": (0.055, 0.004, 0.021, 0.002),
    "flow": (0.016, 0.001, 0.019, 0.001),
    "constant": (0.047, 0.003, 0.039, 0.001),
    "cps": (0.104, 0.064, 0.024, 0.008),
    "ancestral": (0.062, 0.005, 0.022, 0.002),
    "overshoot": (0.067, 0.005, 0.022, 0.003),
}


def broad(x: Tensor, t: float, t_next: float) -> Tensor:
    """Exact velocity of N(MEAN, STD^2)."""
    var = (1 - t) ** 2 + (t * STD) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / var * (x - t * MEAN)


def broad_average(x: Tensor, t: float, t_next: float) -> Tensor:
    """Exact average velocity from t to t_next: the flow of N(MEAN, STD^2) is affine."""
    scale = math.sqrt(((1 - t_next) ** 2 + (t_next * STD) ** 2) / ((1 - t) ** 2 + (t * STD) ** 2))
    return (t_next * MEAN + scale * (x - t * MEAN) - x) / (t_next - t)


def modes(x: Tensor, t: float, t_next: float) -> Tensor:
    """Exact velocity of the two modes, equal weights."""
    var = (1 - t) ** 2 + (t * MODE_STD) ** 2
    gap = x[..., None] - t * MODES
    weight = torch.softmax(-0.5 * gap**2 / var, -1)
    return (weight * (MODES + (t * MODE_STD**2 - (1 - t)) / var * gap)).sum(-1)


def step(kernel: Kernel | None, velocity: Velocity, x: Tensor, t: float, t_next: float) -> Gaussian:
    """The transition from x (N,); an Euler step where there is no kernel."""
    v = velocity(x, t, t_next)
    if kernel is None:
        return Gaussian(x + (t_next - t) * v, torch.zeros_like(x))
    times = torch.tensor([[t], [t_next]], dtype=x.dtype).expand(2, len(x))
    return kernel(x, v, *times, hidden=torch.zeros(len(x), 1))


def affine_law(kernel: Kernel | None, grid: Tensor, velocity: Velocity = broad) -> tuple[float, float]:
    """Mean and std of the last state when every step is affine in x, from the exact marginal at grid[0]."""
    t = float(grid[0])
    mean, var = t * MEAN, (1 - t) ** 2 + (t * STD) ** 2
    for t, t_next in pairwise(grid.tolist()):
        dist = step(kernel, velocity, torch.tensor([mean, mean + 1], dtype=torch.float64), t, t_next)
        slope = float(dist.mean[1] - dist.mean[0])
        mean, var = float(dist.mean[0]), slope**2 * var + float(dist.std.flatten()[0]) ** 2
    return mean, math.sqrt(var)


def w1_to_broad(mean: float, std: float) -> float:
    """E|delta + s z| with delta = mean - MEAN, s = |std - STD|: both laws are normal."""
    shift, scale = abs(mean - MEAN), abs(std - STD)
    return shift if scale < 1e-15 else scale * float(foldnorm.mean(shift / scale))


def quantiles(num: int) -> Tensor:
    return torch.as_tensor(ndtri((torch.arange(num).double() + 0.5).numpy() / num))


def w1_to_modes(kernel: Kernel | None, num_steps: int, num: int = 1000, num_noise: int = 32) -> float:
    x, z = quantiles(num), quantiles(num_noise)
    z = z / z.square().mean().sqrt()
    for t, t_next in pairwise(Uniform()(num_steps).tolist()):
        dist = step(kernel, modes, x, t, t_next)
        if kernel is None:
            x = dist.mean
        else:
            spread = dist.mean[:, None] + dist.std[:, None] * z
            x = spread.flatten().sort()[0].reshape(num, num_noise).mean(1)
    target = (MODES[:, None] + MODE_STD * quantiles(num // 2)).flatten()
    return float((x.sort()[0] - target).abs().mean())


@pytest.mark.parametrize("name", KERNELS)
class TestTable:
    @pytest.mark.parametrize(("num_steps", "column"), [(10, 0), (160, 1)])
    def test_broad_data(self, name, num_steps, column):
        w1 = w1_to_broad(*affine_law(KERNELS[name], Uniform()(num_steps)))
        assert w1 == pytest.approx(TABLE[name][column], abs=0.0006)

    def test_two_modes_at_10_steps(self, name):
        assert w1_to_modes(KERNELS[name], 10) == pytest.approx(TABLE[name][2], abs=0.001)

    def test_two_modes_at_160_steps(self, name):
        w1 = w1_to_modes(KERNELS[name], 160, num=600, num_noise=16)
        assert w1 == pytest.approx(TABLE[name][3], abs=0.0006)


def test_flow_sde_at_5_steps():
    assert w1_to_broad(*affine_law(FlowSDE(0.7), Uniform()(5))) == pytest.approx(0.032, abs=0.0006)
    assert w1_to_modes(FlowSDE(0.7), 5) == pytest.approx(0.109, abs=0.001)


class TestConvergence:
    @pytest.mark.parametrize("name", ["ode", "flow", "constant", "ancestral", "overshoot"])
    @pytest.mark.parametrize("grid", [Uniform(), Shifted(3.0)], ids=repr)
    def test_marginal_preserving_kernels_reach_broad_data(self, name, grid):
        kernel = KERNELS[name]
        assert kernel is None or kernel.marginal_preserving
        errors = [w1_to_broad(*affine_law(kernel, grid(num))) for num in (40, 2000)]
        assert errors[1] < 0.001
        assert errors[1] < errors[0]

    @pytest.mark.parametrize("kernel", [Ancestral(0.2), Ancestral(0.7), Ancestral(1.0), Overshoot(0.2), Overshoot(1.0)])
    def test_ancestral_and_overshoot_converge_like_one_over_k(self, kernel):
        errors = [w1_to_broad(*affine_law(kernel, Uniform()(num))) for num in (200, 400, 800)]
        assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)
        assert errors[1] / errors[2] == pytest.approx(2, abs=0.05)

    @pytest.mark.parametrize("a", [0.4, 0.7])
    def test_flow_sde_forgets_its_first_step_only_like_k_to_the_minus_a_squared(self, a):
        """Below a = 1 the excess noise of the first step decays slower than 1/K: no first-order convergence.

        Isolated by subtracting the chain that starts from the exact marginal after one step.
        """
        excess = []
        for num in (500, 2000):
            grid = Uniform()(num)
            excess.append(affine_law(FlowSDE(a), grid)[1] - affine_law(FlowSDE(a), grid[1:])[1])
        slope = math.log(excess[0] / excess[1]) / math.log(4)
        assert excess[1] > 0
        assert slope == pytest.approx(a**2, abs=0.03)

    def test_cps_never_reaches_broad_data(self):
        """std .426 instead of .5 at eta .7."""
        kernel = CPS(0.7)
        assert not kernel.marginal_preserving
        coarse, fine = (affine_law(kernel, Uniform()(num))[1] for num in (1000, 2000))
        assert 2 * fine - coarse == pytest.approx(0.426, abs=0.0006)

    def test_learned_noise_widens_the_law_by_design(self):
        """Noise without sqrt(dt) piles up with the number of steps; without it the chain is the ODE."""
        kernel = LearnedNoise(1, (1,), 0.1, 0.2).double().requires_grad_(False)
        assert not kernel.marginal_preserving
        noisy, plain = ([affine_law(k, Uniform()(num))[1] for num in (4, 16, 64)] for k in (kernel, None))
        assert all(n > p + 0.03 for n, p in zip(noisy, plain, strict=True))
        assert noisy[0] < noisy[1] < noisy[2]
        assert noisy[2] > 1.2 * STD


class TestAverageVelocityTrap:
    """The score formula needs the instantaneous velocity; a ratio test cannot see it, the end marginal does."""

    @pytest.mark.parametrize(("num_steps", "instantaneous", "average"), [(2, 0.004, 0.150), (4, 0.037, 0.108)])
    def test_flow_sde_on_the_exact_average_velocity_is_biased(self, num_steps, instantaneous, average):
        grid = Uniform()(num_steps)
        right, wrong = (w1_to_broad(*affine_law(FlowSDE(0.7), grid, v)) for v in (broad, broad_average))
        assert right == pytest.approx(instantaneous, abs=0.0006)
        assert wrong == pytest.approx(average, abs=0.0006)

    def test_the_average_velocity_is_exact_for_the_ode(self):
        for num_steps in (1, 2, 7):
            mean, std = affine_law(None, Uniform()(num_steps), broad_average)
            assert mean == pytest.approx(MEAN, abs=1e-12)
            assert std == pytest.approx(STD, abs=1e-12)

    @pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
    def test_ancestral_tolerates_it(self, num_steps):
        grid = Uniform()(num_steps)
        right, wrong = (w1_to_broad(*affine_law(Ancestral(0.5), grid, v)) for v in (broad, broad_average))
        assert wrong < 0.01 < right

    def test_which_is_what_the_kernels_ask_for(self):
        assert FlowSDE().velocity == ConstantSDE().velocity == CPS().velocity == "instantaneous"
        assert Ancestral().velocity == "step"
