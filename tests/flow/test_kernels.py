"""Transition kernels: equal to the published steps, with the gains, kappas and limits the docs quote.

Published forms are written here in their own convention: sigma = 1 - t from 1 (noise) to 0 (data), network
output m = noise - data = -v, d = sigma' - sigma < 0.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rlflow.flow import path
from rlflow.flow.gaussian import Gaussian
from rlflow.flow.grid import FromSigmas, Shifted, Uniform
from rlflow.flow.kernels import CPS, Ancestral, ConstantSDE, FlowSDE, Kernel, LearnedNoise, MarginalSDE, Overshoot

UNEVEN = torch.tensor([0.0, 0.03, 0.11, 0.3, 0.55, 0.85, 1.0], dtype=torch.float64)
KERNELS = [FlowSDE(0.7), FlowSDE(1.2), ConstantSDE(0.3), CPS(0.7), CPS(1.0), Ancestral(0.5), Ancestral(1.0)]
KERNELS += [Overshoot(0.25), Overshoot(3.0)]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


def learned(event_shape: tuple[int, ...] = (3,), **kwargs: float) -> LearnedNoise:
    return LearnedNoise(4, event_shape, **kwargs).double()


def named(kernel: Kernel) -> str:
    return f"{type(kernel).__name__}-{getattr(kernel, 'a', None) or getattr(kernel, 'eta', None) or getattr(kernel, 'c', '')}"


def draw(num: int, *shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, num, *(shape or (3,))).unbind(0)


def steps(grid: Tensor = UNEVEN) -> tuple[Tensor, Tensor]:
    return grid[:-1], grid[1:]


def col(t: Tensor) -> Tensor:
    return t[:, None]


def close(ours: Gaussian, mean: Tensor, std: Tensor) -> None:
    torch.testing.assert_close(ours.mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.std.expand_as(mean), std.expand_as(mean), rtol=0, atol=1e-12)


class TestPublishedForms:
    def sigma(self) -> tuple[Tensor, Tensor, Tensor]:
        """sigma, sigma' (K, 1), and the denominator 1 - sigma with the published special case at sigma = 1."""
        s, s_next = 1 - col(UNEVEN[:-1]), 1 - col(UNEVEN[1:])
        one_minus = 1 - torch.where(s == 1, s_next[0], s)
        return s, s_next, one_minus

    @pytest.mark.parametrize("a", [0.5, 0.7, 0.9, 1.2])
    def test_flow_grpo(self, a):
        x, v = draw(6)
        s, s_next, one_minus = self.sigma()
        d, g, m = s_next - s, a * (s / one_minus).sqrt(), -v
        mean = x * (1 + g**2 / (2 * s) * d) + m * (1 + g**2 * (1 - s) / (2 * s)) * d
        close(FlowSDE(a)(x, v, *steps()), mean, g * (-d).sqrt())

    @pytest.mark.parametrize("a", [0.5, 0.7])
    def test_pi_rl(self, a):
        x, v = draw(6)
        s, s_next, one_minus = self.sigma()
        d, g = s - s_next, a * (s / one_minus).sqrt()
        data, noise = x + s * v, x - (1 - s) * v
        mean = data * (1 - s_next) + noise * (s_next - g**2 * d / (2 * s))
        close(FlowSDE(a)(x, v, *steps()), mean, g * d.sqrt())

    @pytest.mark.parametrize("c", [0.1, 0.5, 1.0, 4.0])
    def test_overshooting(self, c):
        """Along the ODE to t_o, then the two steps back: signal t', noise of the missing variance."""
        x, v = draw(6)
        t, t_next = (col(z) for z in steps())
        too_far = torch.minimum(t_next + c * (t_next - t), torch.ones(1))
        there = x + (too_far - t) * v
        left = t_next / too_far * (1 - too_far)
        close(Overshoot(c)(x, v, *steps()), t_next / too_far * there, ((1 - t_next) ** 2 - left**2).sqrt())

    @pytest.mark.parametrize("eta", [0.25, 0.3])
    def test_dance_grpo(self, eta):
        x, v = draw(6)
        s, s_next, _ = self.sigma()
        d, m = s_next - s, -v
        score = -(x - (x - s * m) * (1 - s)) / s**2
        mean = x + d * m - 0.5 * eta**2 * score * d
        close(ConstantSDE(eta)(x, v, *steps()), mean, eta * (-d).sqrt())

    @pytest.mark.parametrize("eta", [0.1, 0.7, 0.8, 1.0])
    def test_cps(self, eta):
        x, v = draw(6)
        s, s_next, _ = self.sigma()
        m = -v
        std = s_next * math.sin(math.pi * eta / 2)
        mean = (1 - s_next) * (x - s * m) + (s_next**2 - std**2).sqrt() * (x + (1 - s) * m)
        close(CPS(eta)(x, v, *steps()), mean, std)

    def test_ddim_eta_as_ancestral(self):
        """DDIM writes y = x / t with noise level u = sigma / t: S_y = eta u'/u sqrt(u^2 - u'^2) (t > 0)."""
        eta = 0.6
        x, v = draw(5)
        t, t_next = UNEVEN[1:-1], UNEVEN[2:]
        s, u, u_next = 1 - col(t), (1 - col(t)) / col(t), (1 - col(t_next)) / col(t_next)
        data, noise = x + s * v, x - (1 - s) * v
        std = eta * u_next / u * (u**2 - u_next**2).sqrt()
        mean = col(t_next) * (data + (u_next**2 - std**2).clamp(min=0).sqrt() * noise)
        close(Ancestral(eta)(x[:5], v[:5], t, t_next), mean, col(t_next) * std)

    def test_learned_noise(self):
        """x + v dt, log std between its bounds by a tanh: no sqrt(dt), no score."""
        kernel, hidden = learned(std_min=0.05, std_max=0.3), torch.randn(6, 4)
        x, v = draw(6)
        t, t_next = steps()
        torch.nn.init.normal_(kernel.net[-1].weight)
        level = (torch.tanh(kernel.net(torch.cat([hidden, col(t)], -1))) + 1) / 2
        std = torch.exp(math.log(0.05) + (math.log(0.3) - math.log(0.05)) * level)
        close(kernel(x, v, t, t_next, hidden), x + v * col(t_next - t), std)
        assert len(std.unique()) == std.numel()


class TestOneDataPoint:
    """Given x_1 alone, x_t and x_t' are jointly Gaussian."""

    def test_ancestral_at_eta_1_is_the_posterior_given_the_data(self):
        """Backwards the path is Markov, x_t = (t / t') x_t' + noise: a likelihood for the prior N(t' x_1, (1-t')^2)."""
        x, v = draw(5)
        t, t_next = col(UNEVEN[:-2]), col(UNEVEN[1:-1])
        x_1 = x + (1 - t) * v
        ratio = t / t_next
        step_var = (1 - t) ** 2 - ratio**2 * (1 - t_next) ** 2
        precision = 1 / (1 - t_next) ** 2 + ratio**2 / step_var
        mean = (t_next * x_1 / (1 - t_next) ** 2 + ratio / step_var * x) / precision
        close(Ancestral(1.0)(x, v, t[:, 0], t_next[:, 0]), mean, precision**-0.5)

    @pytest.mark.parametrize(
        "kernel", [CPS(0.3), CPS(1.0), Ancestral(0.2), Ancestral(1.0), Overshoot(0.3), Overshoot(2.0)], ids=named
    )
    @pytest.mark.parametrize("grid", [Uniform()(1), Uniform()(2), UNEVEN, Shifted()(50)], ids=len)
    def test_exact_on_one_data_point_at_every_number_of_steps(self, kernel, grid):
        """x_t ~ N(t mu, (1-t)^2) maps to N(t' mu, (1-t')^2), step by step."""
        mu = 1.7
        mean, std = residual(kernel, grid, mu)
        torch.testing.assert_close(mean, mu * grid, rtol=0, atol=1e-12)
        torch.testing.assert_close(std, 1 - grid, rtol=0, atol=1e-12)


def residual(kernel: Kernel, grid: Tensor, mu: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and std (K + 1,) along the grid when the data is the single point mu, v = (mu - x) / (1 - t)."""
    mean, var = [0.0], [1.0]
    for t, t_next in pairwise(grid):
        x = torch.tensor([[mean[-1]], [mean[-1] + 1]])
        dist = kernel(x, (mu - x) / (1 - t), t.expand(2), t_next.expand(2))
        slope = float(dist.mean[1] - dist.mean[0])
        mean.append(float(dist.mean[0]))
        var.append(slope**2 * var[-1] + float(dist.std[0]) ** 2)
    return torch.tensor(mean), torch.tensor(var).sqrt()


class TestResidualNoise:
    @pytest.mark.parametrize(("num_steps", "std"), [(25, 0.093), (160, 0.28), (400, 1.9)])
    def test_constant_sde_on_one_point_diverges_with_the_number_of_steps(self, num_steps, std):
        """eta = .3: eta^2 K is 2.25, 14, 36, above the stability limit 2."""
        assert float(residual(ConstantSDE(0.3), Uniform()(num_steps))[1][-1]) == pytest.approx(std, rel=0.02)

    def test_constant_sde_step_factor_on_one_point(self):
        t, t_next, g = torch.tensor([0.6]), torch.tensor([0.7]), 0.3
        x = torch.tensor([[1.0]])
        dist = ConstantSDE(g)(x, -x / 0.4, t, t_next)
        assert float(dist.mean) == pytest.approx(1 - 0.1 / 0.4 - g**2 * 0.1 / (2 * 0.4**2), abs=1e-14)

    def test_flow_sde_on_one_point_vanishes_with_the_number_of_steps(self):
        assert float(residual(FlowSDE(0.7), Uniform()(400))[1][-1]) < 0.04

    @pytest.mark.parametrize(("a", "excess"), [(0.7, 0.06), (0.9, 0.16), (1.2, 0.52)])
    def test_flow_sde_first_step_adds_a4_over_4_to_the_noise_variance(self, a, excess):
        """Its own variance is a^2 whatever dt; with the kept share (1 - a^2/2)^2 that is 1 + a^4/4."""
        x = torch.tensor([[0.0], [1.0]])  # v = 0 is the noise part alone, as everything is affine
        for dt in (1e-3, 0.1, 0.5):
            dist = FlowSDE(a)(x, torch.zeros_like(x), torch.zeros(2), torch.full((2,), dt))
            kept = float(dist.mean[1] - dist.mean[0])
            assert float(dist.std[0]) == pytest.approx(a, abs=1e-12)
            assert kept**2 + float(dist.std[0]) ** 2 == pytest.approx(1 + a**4 / 4, abs=1e-12)
        assert a**4 / 4 == pytest.approx(excess, abs=0.005)

    def test_flow_sde_leaves_27_times_the_noise_after_sd3s_penultimate_step(self):
        """From the exact marginal N(0, (1-t)^2) of the data point 0: the step .278 -> .0089 of sigma."""
        t, t_next = sd3_grid()[8:9], sd3_grid()[9:10]
        x = torch.tensor([[1.0], [0.0]])
        dist = FlowSDE(0.7)(x, -x / (1 - t), t.expand(2), t_next.expand(2))
        slope = float(dist.mean[0] - dist.mean[1])
        left = math.hypot(slope * (1 - float(t)), float(dist.std[0]))
        assert left / (1 - float(t_next)) == pytest.approx(27, abs=0.5)


class TestOneFamily:
    """CPS, Ancestral and Overshoot: t' x1_hat + k x0_hat with the noise that fills k up to 1 - t'; only k differs."""

    @pytest.mark.parametrize("kernel", [k for k in KERNELS if isinstance(k, CPS | Ancestral | Overshoot)], ids=named)
    def test_the_noise_share_keeps_its_variance(self, kernel):
        x, v = draw(6)
        t, t_next = (col(z) for z in steps())
        dist = kernel(x, v, *steps())
        data, noise = x + (1 - t) * v, x - t * v
        k = (dist.mean - t_next * data) / noise
        torch.testing.assert_close(k, k[:, :1].expand_as(k), rtol=0, atol=1e-11)
        torch.testing.assert_close(k[:, :1] ** 2 + dist.std**2, (1 - t_next) ** 2, rtol=0, atol=1e-11)

    def test_equal_shares_are_equal_kernels(self):
        """CPS at the eta whose cosine is what Overshoot keeps of this step's noise."""
        x, v = draw(1)
        t, t_next, c = torch.tensor([0.3]), torch.tensor([0.45]), 0.6
        too_far = 0.45 + c * 0.15
        share = 0.45 * (1 - too_far) / too_far / 0.55
        ours, cps = (k(x, v, t, t_next) for k in (Overshoot(c), CPS(2 / math.pi * math.acos(share))))
        close(ours, cps.mean, cps.std)


@pytest.mark.parametrize("kernel", [*KERNELS, learned()], ids=named)
def test_the_velocity_behind_a_mean_is_the_one_that_made_it(kernel):
    x, v = draw(6)
    mean = kernel(x, v, *steps(), torch.randn(6, 4)).mean
    torch.testing.assert_close(kernel.velocity_of(mean, x, *steps()), v, rtol=0, atol=1e-11)


class TestSmallSteps:
    @pytest.mark.parametrize("kernel", [FlowSDE(0.7), ConstantSDE(0.3), Ancestral(0.6), Overshoot(0.4)], ids=named)
    def test_marginal_preserving_kernels_obey_the_fokker_planck_condition(self, kernel):
        """drift = v + g^2/2 score with g^2 = var / dt, to first order in dt."""
        x, v = draw(3)
        t = torch.tensor([0.2, 0.5, 0.8])
        errors = []
        for dt in (1e-3, 1e-4):
            dist = kernel(x, v, t, t + dt)
            drift, g2 = (dist.mean - x) / dt, dist.std**2 / dt
            errors.append(float((drift - v - 0.5 * g2 * path.score(x, v, t)).abs().max()))
        assert kernel.marginal_preserving
        assert errors[0] < 0.05
        assert errors[1] < 0.2 * errors[0] + 1e-10

    @pytest.mark.parametrize("kernel", [CPS(0.7), learned()], ids=named)
    def test_cps_and_learned_noise_do_not_and_do_not_claim_to(self, kernel):
        x, v = draw(3)
        t, dt = torch.tensor([0.2, 0.5, 0.8]), 1e-4
        dist = kernel(x, v, t, t + dt, torch.zeros(3, 4))
        g2 = dist.std**2 / dt
        wrong = (dist.mean - x) / dt - v - 0.5 * g2 * path.score(x, v, t)
        assert not kernel.marginal_preserving
        assert float(wrong.detach().abs().min()) > 0.1

    @pytest.mark.parametrize(
        ("kernel", "a"),
        [
            *((Ancestral(eta), eta * 2**0.5) for eta in (0.2, 0.495, 1.0)),
            *((Overshoot(c), (2 * c) ** 0.5) for c in (0.1, 1.0)),
        ],
        ids=str,
    )
    def test_ancestral_and_overshoot_become_flow_sde(self, kernel, a):
        """With a = eta sqrt 2 and sqrt(2 c)."""
        x, v = draw(3)
        t = torch.tensor([0.2, 0.5, 0.8])
        gaps = []
        for dt in (5e-4, 5e-5):
            ours, flow = (k(x, v, t, t + dt) for k in (kernel, FlowSDE(a)))
            drift, noise = (ours.mean - flow.mean) / dt, ours.std / flow.std - 1
            gaps.append([float(drift.abs().max()), float(noise.abs().max())])
        for coarse, fine in zip(*gaps, strict=True):
            assert coarse < 0.1
            assert fine == pytest.approx(coarse / 10, rel=0.05)

    def test_but_not_at_t_0(self):
        """Variance eta^2 (1 - t')^2 against 2 eta^2."""
        x, v = draw(1)
        for dt in (1e-3, 1e-4):
            at = [torch.zeros(1), torch.full((1,), dt)]
            assert float(Ancestral(0.5)(x, v, *at).std ** 2) == pytest.approx(0.25 * (1 - dt) ** 2, abs=1e-12)
            assert float(FlowSDE(0.5 * 2**0.5)(x, v, *at).std ** 2) == pytest.approx(0.5, abs=1e-12)


def sd3_grid() -> Tensor:
    """The 10 steps diffusers gives SD3: shift 3 applied to sigmas that end at an already shifted 1/1000."""
    low = 3 * 0.001 / (1 + 2 * 0.001)
    sigmas = torch.linspace(1, low, 10)
    return FromSigmas([*(3 * sigmas / (1 + 2 * sigmas)).tolist(), 0.0])(10)


class TestGain:
    """c = dmean/dv in closed form, and what follows from it."""

    def closed_form(self, kernel: Kernel, t: Tensor, t_next: Tensor) -> Tensor:
        dt = t_next - t
        if isinstance(kernel, FlowSDE):
            return torch.where(t > 0, dt * (1 + kernel.a**2 / 2), dt)
        if isinstance(kernel, ConstantSDE):
            return dt * (1 + kernel.eta**2 * t / (2 * (1 - t)))
        if isinstance(kernel, LearnedNoise):
            return dt
        zero = torch.zeros(len(t), 1)
        std = kernel(zero, zero, t, t_next).std[:, 0]
        return t_next * (1 - t) - t * ((1 - t_next) ** 2 - std**2).clamp(min=0).sqrt()

    @pytest.mark.parametrize("kernel", [*KERNELS, learned()], ids=named)
    @pytest.mark.parametrize("grid", [UNEVEN, Uniform()(10), Shifted()(25)], ids=len)
    def test_closed_forms(self, kernel, grid):
        t, t_next = steps(grid)
        torch.testing.assert_close(kernel.gain(t, t_next), self.closed_form(kernel, t, t_next), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("kernel", [*KERNELS, learned()], ids=named)
    def test_is_the_derivative_of_the_mean_in_every_dimension(self, kernel):
        t, t_next = steps()
        x, v = draw(6)
        v.requires_grad_(True)
        (slope,) = torch.autograd.grad(kernel(x, v, t, t_next, torch.zeros(6, 4)).mean.sum(), v)
        torch.testing.assert_close(slope, col(kernel.gain(t, t_next)).expand(6, 3), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("kernel", KERNELS, ids=named)
    def test_exact_kl_is_half_the_squared_kappa_times_the_velocity_gap(self, kernel):
        t, t_next = steps(UNEVEN[:-1])
        x, v = draw(5)
        dv = torch.randn_like(v)
        kl = kernel(x, v, t, t_next).kl(kernel(x, v + dv, t, t_next), "mean")
        expected = 0.5 * kernel.kappa(t, t_next) ** 2 * dv.square().mean(-1)
        torch.testing.assert_close(kl, expected, rtol=1e-10, atol=0)

    def test_flow_sde_kl_in_closed_form(self):
        t, t_next = steps()
        dt, a = t_next - t, 0.7
        inside = (1 + a**2 / 2) ** 2 * t * dt / (2 * a**2 * (1 - t))
        expected = torch.where(t > 0, inside, dt**2 / (2 * a**2))
        torch.testing.assert_close(0.5 * FlowSDE(a).kappa(t, t_next) ** 2, expected, rtol=1e-12, atol=0)

    def test_one_clip_range_is_not_one_unit_across_kernels(self):
        t, t_next = torch.tensor([0.5]), torch.tensor([0.6])
        ratio = CPS(0.8).gain(t, t_next) / FlowSDE(0.7).gain(t, t_next)
        assert float(ratio) == pytest.approx(1.9, abs=0.05)


class TestKappa:
    @pytest.mark.parametrize(
        ("kernel", "sd3", "uniform"),
        [(FlowSDE(0.7), 1.5, 1.1), (CPS(0.7), 34, 1.6), (Ancestral(0.495), 61, 2.4)],
        ids=["flow", "cps", "ancestral"],
    )
    def test_published_table(self, kernel, sd3, uniform):
        """SD3's step .722 -> .991, and .8 -> .9 of the uniform grid."""
        t, t_next = steps(sd3_grid())
        assert (round(float(t[8]), 3), round(float(t_next[8]), 3)) == (0.722, 0.991)
        kappa = kernel.kappa(t, t_next)
        assert float(kappa[8]) == pytest.approx(sd3, rel=0.02)
        assert float(kappa[:8].max()) < 5
        t, t_next = steps(Uniform()(10))
        assert float(kernel.kappa(t, t_next)[8]) == pytest.approx(uniform, abs=0.05)

    def test_learned_noise_is_judged_at_its_smallest_std(self):
        kernel = learned(std_min=0.1, std_max=0.2)
        t, t_next = steps()
        torch.testing.assert_close(kernel.kappa(t, t_next), (t_next - t) / 0.1)
        with torch.no_grad():
            kernel.net[-1].bias.fill_(-50.0)
        reached = kernel(*draw(6), t, t_next, torch.zeros(6, 4)).std
        torch.testing.assert_close(reached, torch.full((6, 3), 0.1))

    def test_needs_no_network_and_leaves_float32_weights_alone(self):
        kernel = LearnedNoise(4, (3,)).float()
        assert kernel.kappa(*steps()).dtype == torch.float64
        assert all(p.dtype == torch.float32 for p in kernel.parameters())


class TestLastStep:
    @pytest.mark.parametrize("kernel", [CPS(0.7), Ancestral(0.7), Overshoot(0.5)], ids=named)
    def test_has_no_noise_and_says_so_by_an_infinite_kappa(self, kernel):
        t, t_next = torch.tensor([0.9]), torch.ones(1)
        x, v = draw(1)
        dist = kernel(x, v, t, t_next)
        assert float(dist.std) == 0.0
        torch.testing.assert_close(dist.mean, x + 0.1 * v)
        assert float(kernel.kappa(t, t_next)) == math.inf

    @pytest.mark.parametrize("kernel", [FlowSDE(), ConstantSDE(), learned()], ids=named)
    def test_of_the_others_has_a_density(self, kernel):
        assert 0 < float(kernel.kappa(torch.tensor([0.9]), torch.ones(1))) < 5


@pytest.mark.parametrize("kernel", [*KERNELS, learned((2, 4, 4))], ids=named)
class TestShapesAndPrecision:
    shape = (2, 4, 4)

    def test_rows_with_their_own_times_equal_rows_alone(self, kernel):
        x, v = draw(6, *self.shape)
        t, t_next = steps()
        hidden = torch.randn(6, 4)
        together = kernel(x, v, t, t_next, hidden)
        for i in range(6):
            one = slice(i, i + 1)
            alone = kernel(x[one], v[one], t[one], t_next[one], hidden[one])
            torch.testing.assert_close(together.mean[one], alone.mean, rtol=0, atol=1e-15)
            torch.testing.assert_close(together.std[one], alone.std, rtol=0, atol=1e-15)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_half_precision_is_computed_in_float32(self, kernel, dtype):
        x, v = (z.to(dtype) for z in draw(5, *self.shape))
        t, t_next = steps(UNEVEN[:-1])
        hidden = torch.randn(5, 4)
        dist = kernel(x, v, t, t_next, hidden)
        exact = kernel(x.double(), v.double(), t, t_next, hidden)
        assert dist.mean.dtype == dist.std.dtype == torch.float32
        torch.testing.assert_close(dist.mean.double(), exact.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dist.std.double(), exact.std, rtol=1e-4, atol=1e-6)

    def test_float64_stays_float64(self, kernel):
        dist = kernel(*draw(6, *self.shape), *steps(), torch.zeros(6, 4))
        assert dist.mean.dtype == dist.std.dtype == torch.float64

    def test_std_does_not_depend_on_x_or_v(self, kernel):
        hidden = torch.randn(6, 4)
        a, b = (kernel(*draw(6, *self.shape), *steps(), hidden).std for _ in range(2))
        assert torch.equal(a, b)


class TestLearnedNoise:
    def test_starts_at_the_geometric_mean_of_its_bounds(self):
        std = learned(std_min=0.05, std_max=0.2)(*draw(6), *steps(), torch.randn(6, 4)).std
        torch.testing.assert_close(std, torch.full((6, 3), 0.1))

    def test_reads_time_and_features_but_not_the_state(self):
        kernel = learned()
        torch.nn.init.normal_(kernel.net[-1].weight, std=0.1)
        x, v = draw(6)
        hidden = torch.randn(6, 4)
        base = kernel(x, v, *steps(), hidden).std
        assert torch.equal(kernel(x + 1, v + 1, *steps(), hidden).std, base)
        assert not torch.equal(kernel(x, v, *steps(), hidden + 1).std, base)
        other_time = kernel(x, v, *steps(UNEVEN**2), hidden).std
        assert torch.equal(other_time[0], base[0])  # t = 0 in both
        assert not torch.isclose(other_time[1:], base[1:], rtol=1e-6).any()

    def test_gradients_reach_the_net_and_the_features(self):
        kernel = learned()
        hidden = torch.randn(6, 4, requires_grad=True)
        torch.nn.init.normal_(kernel.net[-1].weight)
        kernel(*draw(6), *steps(), hidden).std.log().sum().backward()
        assert float(hidden.grad.abs().sum()) > 0
        assert all(float(p.grad.abs().sum()) > 0 for p in kernel.parameters())

    def test_its_upper_bound_holds_and_then_falls_along_a_half_cosine(self):
        kernel = learned(std_min=0.1, std_max=0.3, hold=0.35, final=0.7)
        torch.nn.init.constant_(kernel.net[-1].bias, 100.0)  # wide open
        expected = {0.0: 0.3, 0.35: 0.3, 0.675: 0.1 + 0.2 * 0.85, 1.0: 0.3 * 0.1 + 0.7 * 0.3}
        for progress, top in expected.items():
            kernel.set_progress(progress)
            std = kernel(*draw(6), *steps(), torch.randn(6, 4)).std
            torch.testing.assert_close(std, torch.full((6, 3), top))
            torch.testing.assert_close(kernel.min_std(*steps()), torch.full((6,), 0.1))

    def test_without_a_hold_shorter_than_the_run_it_never_moves(self):
        kernel = learned(std_min=0.1, std_max=0.3)
        kernel.set_progress(1.0)
        assert kernel.hi == math.log(0.3)

    def test_asks_for_features(self):
        with pytest.raises(ValueError, match="pass hidden"):
            learned()(*draw(6), *steps())


class TestAnnealing:
    def test_the_noise_of_flow_sde_holds_and_then_falls_and_the_law_stays_that_of_its_a(self):
        kernel = FlowSDE(0.8, hold=0.5, final=0.25)
        for progress, a in {0.0: 0.8, 0.5: 0.8, 0.75: 0.8 * 0.625, 1.0: 0.2}.items():
            kernel.set_progress(progress)
            (x, v), expected = draw(6), FlowSDE(a)
            close(kernel(x, v, *steps()), *(getattr(expected(x, v, *steps()), n) for n in ("mean", "std")))

    def test_without_a_hold_shorter_than_the_run_it_never_moves(self):
        kernel = FlowSDE(0.7)
        kernel.set_progress(1.0)
        assert kernel.a == 0.7

    @pytest.mark.parametrize("wrong", [{"hold": 1.5}, {"final": 0.0}])
    def test_a_schedule_that_makes_no_sense(self, wrong):
        with pytest.raises(ValueError, match="FlowSDE needs hold in"):
            FlowSDE(0.7, **wrong)


class TestExtension:
    def test_a_new_sde_overrides_g_only(self):
        class Sine(MarginalSDE):
            def g(self, t, t_next):
                return torch.sin(math.pi * t)

        x, v = draw(6)
        t, t_next = (col(z) for z in steps())
        g, dt = torch.sin(math.pi * t), t_next - t
        mean = x + (v + 0.5 * g**2 * (t * v - x) / (1 - t)) * dt
        close(Sine()(x, v, *steps()), mean, g * dt.sqrt())

    def test_which_velocity_a_kernel_asks_for(self):
        asks = {k: k.velocity for k in (FlowSDE, ConstantSDE, CPS, Ancestral, Overshoot, LearnedNoise)}
        assert [k.__name__ for k, v in asks.items() if v == "step"] == ["Ancestral", "LearnedNoise"]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FlowSDE(0.0), "a > 0"),
        (lambda: FlowSDE(-0.7), "a > 0"),
        (lambda: ConstantSDE(0.0), "eta > 0"),
        (lambda: CPS(0.0), "0 < eta <= 1"),
        (lambda: CPS(1.8), "CPS needs 0 < eta <= 1, got 1.8: .* not monotonic"),
        (lambda: Ancestral(1.0001), "Ancestral needs 0 < eta <= 1"),
        (lambda: Ancestral(-0.1), "0 < eta <= 1"),
        (lambda: Overshoot(0.0), "Overshoot needs c > 0, got 0.0; .* no noise to score"),
        (lambda: Overshoot(-1.0), "c > 0"),
        (lambda: LearnedNoise(4, (3,), 0.2, 0.1), "std_min < std_max"),
        (lambda: LearnedNoise(4, (3,), 0.0, 0.1), "0 < std_min"),
        (lambda: LearnedNoise(4, (3,), hold=1.5), "hold in"),
        (lambda: LearnedNoise(4, (3,), final=0.0), "final in"),
    ],
)
def test_a_parameter_without_a_density_is_an_error(make, match):
    with pytest.raises(ValueError, match=match):
        make()
