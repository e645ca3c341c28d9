"""Losses: where the clipped gradient stops, what GRPO-Guard centres, and three scales of one KL."""

import math

import pytest
import torch
from torch import Tensor, nn

from rlflow.flow.gaussian import Gaussian
from rlflow.flow.grid import Shifted
from rlflow.flow.kernels import CPS, Ancestral, ConstantSDE, FlowSDE, LearnedNoise
from rlflow.rl.learners.regularizers import reference_kl
from rlflow.rl.likelihoods.base import Score
from rlflow.rl.masked import weighted_sum
from rlflow.rl.objectives.clip import clip_fraction, clipped_surrogate
from rlflow.rl.objectives.guard import guard_log_ratio, mean_shift
from rlflow.types import Evidence

LOW, HIGH = 0.1, 0.3
RATIO = torch.tensor([0.5, 0.89, 0.91, 1.0, 1.29, 1.31, 2.0], dtype=torch.float64)
KERNELS = [FlowSDE(0.7), ConstantSDE(0.3), CPS(0.7), Ancestral(0.6)]


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def named(part: object) -> str:
    return type(part).__name__


class TestClippedSurrogate:
    def slope(self, advantage: float) -> Tensor:
        log_ratio = RATIO.log().requires_grad_()
        loss = clipped_surrogate(log_ratio, torch.tensor(advantage), LOW, HIGH).sum()
        return torch.autograd.grad(loss, log_ratio)[0]

    def test_a_good_action_is_pushed_until_1_plus_high_and_never_stopped_below(self):
        close(self.slope(2.0), torch.where(1 + HIGH < RATIO, 0.0, -2 * RATIO))

    def test_a_bad_action_is_pushed_until_1_minus_low_and_never_stopped_above(self):
        close(self.slope(-2.0), torch.where(1 - LOW > RATIO, 0.0, 2 * RATIO))

    def test_no_advantage_no_gradient(self):
        assert not self.slope(0.0).any()

    def test_is_a_pessimistic_bound(self):
        for a in (-1.5, 1.5):
            advantage = torch.tensor(a, dtype=torch.float64)
            assert bool((clipped_surrogate(RATIO.log(), advantage, LOW, HIGH) >= -a * RATIO - 1e-12).all())

    @pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
    def test_clip_fraction_counts_exactly_the_cut_gradients(self, advantage):
        cut = clip_fraction(RATIO.log(), torch.tensor(advantage), LOW, HIGH)
        assert torch.equal(cut > 0, (self.slope(advantage) == 0) & (advantage != 0))


class TestWeightedSum:
    def test_a_masked_nan_reaches_neither_the_value_nor_the_gradient(self):
        value = torch.tensor([1.0, torch.nan, torch.inf, 2.0], requires_grad=True)
        total = weighted_sum(value, torch.tensor([1.0, 0.0, 0.0, 0.5]))
        total.backward()
        assert float(total.detach()) == 2.0
        assert value.grad.tolist() == [1.0, 0.0, 0.0, 0.5]


def evidence(old: Gaussian, x_next: Tensor, t: Tensor, t_next: Tensor, ref: Gaussian | None = None) -> Evidence:
    """Evidence (N, R, *D) of pairs sampled from `old`."""
    blank = torch.zeros_like(t)
    kept = {} if ref is None else {"ref_mean": ref.mean, "ref_std": ref.std}
    return Evidence(x_next, x_next, t, t_next, blank, old.mean, old.std, blank == 0, **kept)


class TestGuard:
    """Synthetic steps: D = 40 dims, 400,000 numbers, a shift of the mean by a thousandth to a tenth of a std."""

    N, D = 10_000, 40

    def log_ratios(self, std: float, shift: float, reduce: str) -> tuple[Tensor, Tensor, Tensor]:
        """(plain, guarded, |dmu| per dim) of samples from the old law."""
        dmu = shift * double(self.D, seed=1)
        old = Gaussian(torch.zeros(self.N, 1, self.D, dtype=torch.float64), torch.full((self.N, 1, 1), std).double())
        new = Gaussian(old.mean + dmu, old.std)
        x_next = old.sample(double(self.N, 1, self.D))
        zero = torch.zeros(self.N, 1, dtype=torch.float64)
        log_ratio = new.log_prob(x_next, reduce, 2) - old.log_prob(x_next, reduce, 2)
        pairs = evidence(old, x_next, zero, zero + 0.1)
        return log_ratio, guard_log_ratio(log_ratio, Score(log_ratio, new), pairs, reduce), dmu

    @pytest.mark.parametrize("reduce", ["mean", "sum"])
    @pytest.mark.parametrize(("std", "shift"), [(0.5, 0.05), (0.02, 0.002), (2.0, 0.05)])
    def test_centres_what_is_biased(self, std, shift, reduce):
        """E[log r] = -|dmu|^2 / (2 S^2); E[log r_guard] = 0 with variance mean(dmu^2) / D, or |dmu|^2 under a sum."""
        plain, guarded, dmu = self.log_ratios(std, shift, reduce)
        square = float(dmu.square().mean() if reduce == "mean" else dmu.square().sum())
        variance = square / self.D if reduce == "mean" else square
        error = math.sqrt(variance / self.N)
        assert float(plain.mean()) == pytest.approx(-square / (2 * std**2), abs=4 * error / std)
        assert abs(float(plain.mean())) > 6 * error / std
        assert float(guarded.mean()) == pytest.approx(0, abs=4 * error)
        assert float(guarded.var()) == pytest.approx(variance, rel=0.06)

    def test_its_variance_does_not_know_the_std(self):
        a, b = (self.log_ratios(std, 0.01, "mean")[1] for std in (0.1, 1.0))
        close(a, b)

    def test_its_gradient_at_unchanged_weights_is_the_plain_one_times_the_std(self):
        std = torch.tensor([0.1, 0.7], dtype=torch.float64).reshape(1, 2, 1)
        old = Gaussian(double(3, 2, 4), std.expand(3, 2, 1))
        mean = old.mean.clone().requires_grad_()
        x_next, new = old.sample(double(3, 2, 4, seed=1)), Gaussian(mean, old.std)
        log_ratio = new.log_prob(x_next, "sum", 2) - old.log_prob(x_next, "sum", 2)
        pairs = evidence(old, x_next, std[..., 0].expand(3, 2), std[..., 0].expand(3, 2))
        guarded = guard_log_ratio(log_ratio, Score(log_ratio, new), pairs, "sum")
        plain, ours = (torch.autograd.grad(v.sum(), mean, retain_graph=True)[0] for v in (log_ratio, guarded))
        close(ours, plain * std)

    def test_the_mean_shift_is_half_the_squared_shift_in_stds(self):
        old = Gaussian(torch.zeros(1, 1, 2), torch.full((1, 1, 1), 0.5))
        new = Gaussian(torch.tensor([[[3.0, 4.0]]]), old.std)
        pairs = evidence(old, old.mean, torch.zeros(1, 1), torch.ones(1, 1))
        assert float(mean_shift(Score(torch.zeros(1, 1), new), pairs, "sum")) == 50.0
        assert float(mean_shift(Score(torch.zeros(1, 1), new), pairs, "mean")) == 25.0


def steps(kernel: object, v: Tensor, v_ref: Tensor) -> tuple[Gaussian, Gaussian, Tensor, Tensor]:
    """Transitions (N, R, D) of two velocities from one state, over a shifted grid's first R steps (t = 0 included)."""
    n, r, _ = v.shape
    grid = Shifted(2.0)(r + 1)
    t, t_next = grid[:r].repeat(n), grid[1 : r + 1].repeat(n)
    x = double(n * r, v.shape[-1], seed=9)
    out = [kernel(x, u.flatten(0, 1), t, t_next) for u in (v, v_ref)]
    lift = [Gaussian(d.mean.unflatten(0, (n, r)), d.std.unflatten(0, (n, r))) for d in out]
    return *lift, t.reshape(n, r), t_next.reshape(n, r)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
class TestReferenceKL:
    V, V_REF = double(3, 5, 4), double(3, 5, 4, seed=1)

    def kl(self, kind: str, kernel: object, reduce: str) -> Tensor:
        new, ref, t, t_next = steps(kernel, self.V, self.V_REF)
        pairs = evidence(new, new.mean, t, t_next, ref)
        gain = kernel.gain(t.flatten(), t_next.flatten()).view_as(t)
        return reference_kl(kind, new, pairs, reduce, gain)

    @staticmethod
    def reduced(value: Tensor, reduce: str) -> Tensor:
        return value.mean(-1) if reduce == "mean" else value.sum(-1)

    @pytest.mark.parametrize("kernel", KERNELS, ids=named)
    def test_exact_is_torchs_kl(self, kernel, reduce):
        new, ref, *_ = steps(kernel, self.V, self.V_REF)
        law, ref_law = (torch.distributions.Normal(d.mean, d.std.expand_as(d.mean)) for d in (new, ref))
        close(
            self.kl("exact", kernel, reduce),
            self.reduced(torch.distributions.kl_divergence(law, ref_law), reduce),
            1e-9,
        )

    def test_exact_is_torchs_kl_for_unequal_stds_of_every_dim(self, reduce):
        new, ref = Gaussian(double(3, 5, 4), double(3, 5, 4, seed=2).exp()), Gaussian(self.V, self.V_REF.exp())
        pairs = evidence(new, new.mean, torch.zeros(3, 5), torch.ones(3, 5), ref)
        law, ref_law = (torch.distributions.Normal(d.mean, d.std) for d in (new, ref))
        expected = self.reduced(torch.distributions.kl_divergence(law, ref_law), reduce)
        close(reference_kl("exact", new, pairs, reduce, None), expected)

    def test_exact_is_the_mean_log_ratio_of_samples(self, reduce):
        new, ref = Gaussian(double(1, 1, 3), torch.full((1, 1, 3), 0.7)), Gaussian(double(1, 1, 3, seed=4), self.ones())
        x = new.sample(double(200_000, 1, 3, seed=5))
        monte_carlo = (new.log_prob(x, reduce, 2) - ref.log_prob(x, reduce, 2)).mean()
        pairs = evidence(new, new.mean, torch.zeros(1, 1), torch.ones(1, 1), ref)
        assert float(reference_kl("exact", new, pairs, reduce, None)) == pytest.approx(float(monte_carlo), rel=0.02)

    @staticmethod
    def ones() -> Tensor:
        return torch.ones(1, 1, 3)

    @pytest.mark.parametrize("kernel", KERNELS, ids=named)
    def test_velocity_is_the_squared_difference_of_velocities(self, kernel, reduce):
        close(self.kl("velocity", kernel, reduce), self.reduced((self.V - self.V_REF).square(), reduce), 1e-9)

    @pytest.mark.parametrize("kernel", KERNELS, ids=named)
    def test_exact_is_half_the_squared_gain_over_std_times_the_velocity_form(self, kernel, reduce):
        new, _, t, t_next = steps(kernel, self.V, self.V_REF)
        c, std = kernel.gain(t.flatten(), t_next.flatten()).view_as(t), new.std[..., 0]
        close(self.kl("exact", kernel, reduce), (c / std).square() / 2 * self.kl("velocity", kernel, reduce), 1e-9)

    @pytest.mark.parametrize("kernel", KERNELS, ids=named)
    def test_released_is_dt_times_the_exact_one(self, kernel, reduce):
        _, _, t, t_next = steps(kernel, self.V, self.V_REF)
        close(self.kl("released", kernel, reduce), (t_next - t) * self.kl("exact", kernel, reduce))

    def test_released_is_flow_grpos_formula(self, reduce):
        """|dmu|^2 / (2 g^2), without the dt of the step's variance."""
        kernel = FlowSDE(0.7)
        new, ref, t, t_next = steps(kernel, self.V, self.V_REF)
        g = kernel.g(t, t_next).unsqueeze(-1)
        expected = self.reduced((new.mean - ref.mean).square() / (2 * g.square()), reduce)
        close(self.kl("released", kernel, reduce), expected, 1e-9)

    def test_flow_sdes_exact_kl_in_closed_form(self, reduce):
        """(1 + a^2/2)^2 t dt / (2 a^2 (1 - t)) |dv|^2 for t > 0, dt^2 / (2 a^2) |dv|^2 at t = 0."""
        a = 0.7
        _, _, t, t_next = steps(FlowSDE(a), self.V, self.V_REF)
        dt, dv = t_next - t, self.reduced((self.V - self.V_REF).square(), reduce)
        later = (1 + a**2 / 2) ** 2 * t * dt / (2 * a**2 * (1 - t))
        close(self.kl("exact", FlowSDE(a), reduce), torch.where(t > 0, later, dt.square() / (2 * a**2)) * dv, 1e-9)

    def test_the_velocity_form_holds_for_learned_noise_too_and_leaves_its_std_alone(self, reduce):
        kernel = LearnedNoise(2, (4,)).double()
        nn.init.normal_(kernel.net[-1].weight)
        n, r = 3, 5
        t = torch.linspace(0, 0.8, r, dtype=torch.float64).repeat(n)
        hidden = double(n * r, 2, seed=6)
        new, ref = (kernel(double(n * r, 4), v.flatten(0, 1), t, t + 0.1, hidden) for v in (self.V, self.V_REF))
        lift = [Gaussian(d.mean.unflatten(0, (n, r)), d.std.unflatten(0, (n, r))) for d in (new, ref)]
        pairs = evidence(lift[0], lift[0].mean, t.reshape(n, r), t.reshape(n, r) + 0.1, lift[1])
        value = reference_kl("velocity", lift[0], pairs, reduce, kernel.gain(t, t + 0.1).view(n, r))
        close(value, self.reduced((self.V - self.V_REF).square(), reduce), 1e-9)
        assert new.std.requires_grad
        assert not value.requires_grad

    def test_without_a_recorded_reference_it_says_so(self, reduce):
        new, _, t, t_next = steps(FlowSDE(), self.V, self.V_REF)
        with pytest.raises(ValueError, match="no reference was recorded"):
            reference_kl("exact", new, evidence(new, new.mean, t, t_next), reduce, None)
