"""FPO's surrogate: at unchanged weights the ratio is 1 and the gradient -A grad loss; its scale on a Gaussian is pi s / 2."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from rlflow.flow.field import VelocityField
from rlflow.flow.guidance import CFG
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.matching import cfm_loss
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import All, AllButLast, NoSteps
from rlflow.models.mlp import MLPField
from rlflow.rl.advantages import GAE
from rlflow.rl.learners.regularizers import KL, reference_kl
from rlflow.rl.likelihoods.cfm import CFMLikelihood, calibration
from rlflow.rl.objectives.clip import ASPO, SPO, Clip, asymmetric_surrogate, clipped_surrogate, simple_surrogate
from rlflow.rl.objectives.guard import Guard
from rlflow.types import Chain, Cond, Evidence

N = 6
PER_DRAW, MEAN = CFMLikelihood(4, joint=False), CFMLikelihood(4)


def chain_of(final: Tensor) -> Chain:
    """A sample without scored steps."""
    empty = final.new_empty(len(final), 0)
    return Chain(final, empty, empty, empty, empty, empty, empty)


def record(policy: FlowPolicy, likelihood: CFMLikelihood, iteration: int = 0) -> tuple[Evidence, Cond]:
    cond = policy.encode(torch.linspace(-1, 1, 4 * N, dtype=torch.float64).reshape(N, 4))
    key, ids = Key(0, "rollout", iteration), torch.arange(N)
    with torch.no_grad():
        return likelihood.record(policy, cond, policy.sample(cond, key=key, row_ids=ids), key, ids), cond


def losses(policy: FlowPolicy, evidence: Evidence, cond: Cond) -> Tensor:
    """(N, S) by the loss that pre-training uses."""
    rows = torch.arange(len(evidence.t)).repeat_interleave(evidence.t.shape[1])
    args = (evidence.x_next.flatten(0, 1), cond.index(rows), evidence.x.flatten(0, 1), evidence.t.flatten())
    return cfm_loss(policy.field.unguided, *args).view_as(evidence.t)


def flat_gradient(loss: Tensor, policy: FlowPolicy) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.field.parameters()))])


class TestRatio:
    @pytest.mark.parametrize("joint", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_is_exactly_1_at_unchanged_weights_and_not_after_a_step(self, make, joint, dtype):
        parts = make(
            "reach", steps=NoSteps(), likelihood=CFMLikelihood(3, joint=joint), dtype=dtype, micro_batch=7, epochs=2
        )
        metrics = parts.iterate(0)
        assert metrics["policy/first_log_ratio_max"] == 0
        assert metrics["policy/approx_kl"] > 0

    def test_columns_are_the_draws_and_minus_their_losses(self, make):
        policy = make().policy
        evidence, cond = record(policy, PER_DRAW)
        assert evidence.old_log_prob.shape == (N, 4)
        torch.testing.assert_close(evidence.old_log_prob, -losses(policy, evidence, cond))
        torch.testing.assert_close(PER_DRAW.score(policy, cond, evidence).log_prob, -losses(policy, evidence, cond))

    def test_of_a_sample_is_the_exponential_of_the_mean_of_its_draws(self, make):
        policy = make().policy
        evidence, cond = record(policy, MEAN)
        with torch.no_grad():
            for p in policy.parameters():
                p += 0.05 * torch.randn_like(p)
        score = MEAN.score(policy, cond, evidence).log_prob
        columns = PER_DRAW.log_ratio(score, evidence)
        assert float(columns.detach().abs().max()) > 1e-3
        torch.testing.assert_close(MEAN.log_ratio(score, evidence), columns.mean(1, keepdim=True))

    @pytest.mark.parametrize("reduce", ["mean", "sum", "sqrt"])
    def test_reductions_over_the_event_differ_by_its_size_alone(self, make, reduce):
        policy = make("reach").policy  # D = 4
        mean, _ = record(policy, MEAN)
        other, _ = record(policy, CFMLikelihood(4, reduce=reduce))
        torch.testing.assert_close(other.old_log_prob, mean.old_log_prob * {"mean": 1, "sqrt": 2, "sum": 4}[reduce])


class TestSupervision:
    def test_of_the_noise_is_the_velocity_loss_times_t_squared(self, make):
        """And is what it says: the squared error of the noise that the velocity predicts."""
        policy = make().policy
        velocity, _ = record(policy, PER_DRAW)
        eps, _ = record(policy, CFMLikelihood(4, "eps", joint=False))
        torch.testing.assert_close(eps.old_log_prob, velocity.t**2 * velocity.old_log_prob)
        t = eps.t[..., None]
        x_t = (1 - t) * eps.x + t * eps.x_next
        predicted = x_t - t * eps.old_mean
        torch.testing.assert_close(eps.old_log_prob, -(predicted - eps.x).square().mean(-1))

    def test_of_the_sample_is_the_squared_error_of_the_sample_that_the_velocity_predicts(self, make):
        sample, _ = record(make().policy, CFMLikelihood(4, "sample", joint=False))
        t = sample.t[..., None]
        x_t = (1 - t) * sample.x + t * sample.x_next
        predicted = x_t + (1 - t) * sample.old_mean
        torch.testing.assert_close(sample.old_log_prob, -(predicted - sample.x_next).square().mean(-1))

    @pytest.mark.parametrize("supervise", ["velocity", "eps", "sample"])
    def test_normalized_is_divided_by_the_mean_error_of_the_sampling_weights(self, make, supervise):
        """Of one scale at all times and draws; the divisor stays while the weights move, so 1 is still the first ratio."""
        policy = make().policy
        plain, likelihood = CFMLikelihood(4, supervise, joint=False), CFMLikelihood(4, supervise, normalize=True)
        evidence, cond = record(policy, likelihood)
        before, _ = record(policy, plain)
        t = evidence.t
        weight = {"velocity": t**0, "eps": t, "sample": 1 - t}[supervise]
        size = weight * (evidence.old_mean - (evidence.x_next - evidence.x)).abs().mean(-1)
        torch.testing.assert_close(evidence.old_log_prob, before.old_log_prob / size)
        with torch.no_grad():
            for p in policy.field.parameters():
                p.add_(0.05)
            moved = likelihood.score(policy, cond, evidence).log_prob
            torch.testing.assert_close(moved, plain.score(policy, cond, evidence).log_prob / size)


class TestDraws:
    def test_stratified_times_are_one_in_each_part_and_uniform_in_all(self, make):
        policy, ids = make().policy, torch.arange(500)
        cond, chain = policy.encode(torch.zeros(500, 4)), chain_of(torch.zeros(500, 2))
        t = CFMLikelihood(4, stratified=True).record(policy, cond, chain, Key(0, "a"), ids).t
        assert torch.equal((t * 4).long(), torch.arange(4).expand(500, 4))
        inside = (t * 4 - torch.arange(4)).flatten().sort().values
        assert float((inside - torch.linspace(0, 1, 2000)).abs().max()) < 1.63 / 2000**0.5

    def test_a_group_may_share_its_draws(self, make):
        """The same noises and times in all of its rows, others in every other group and iteration."""
        parts = make(steps=NoSteps(), likelihood=CFMLikelihood(3, shared_draws=True))
        one, next_one = (parts.collect(i).evidence for i in (0, 1))
        for value in (one.x, one.t):
            groups = value.unflatten(0, (4, 4))
            assert torch.equal(groups, groups[:, :1].expand_as(groups))
            assert not torch.isclose(groups[0, 0], groups[1, 0]).any()
        assert not torch.isclose(one.t, next_one.t).any()
        assert not torch.equal(one.x_next[0], one.x_next[1]), "the samples differ"

    def test_are_of_the_key_and_the_row_and_of_nothing_else(self, make):
        policy = make().policy
        whole, _ = record(policy, PER_DRAW)
        cond, ids = policy.encode(torch.zeros(2, 4)), torch.tensor([4, 1])
        some = PER_DRAW.record(policy, cond, chain_of(torch.zeros(2, 2)), Key(0, "rollout"), ids)
        assert torch.equal(some.x, whole.x[ids])
        assert torch.equal(some.t, whole.t[ids])
        other, _ = record(policy, PER_DRAW, iteration=1)
        assert not torch.isclose(other.t, whole.t).any()
        assert not torch.isclose(other.x, whole.x).any()
        assert not torch.isclose(whole.x[:, 0], whole.x[:, 1]).any()

    def test_are_kept_for_every_epoch(self, make):
        """Fresh draws at the update would make the first ratio noise."""
        policy = make().policy
        evidence, cond = record(policy, PER_DRAW)
        first, second = (PER_DRAW.score(policy, cond, evidence).log_prob for _ in range(2))
        assert torch.equal(first, second)

    def test_times_are_uniform_or_starts_of_the_grids_steps(self, make):
        policy, ids = make(num_steps=5).policy, torch.arange(2000)
        cond, chain = policy.encode(torch.zeros(2000, 4)), chain_of(torch.zeros(2000, 2))
        t = CFMLikelihood(1).record(policy, cond, chain, Key(0, "a"), ids).t.flatten().sort().values
        assert float((t - torch.linspace(0, 1, 2000)).abs().max()) < 1.63 / 2000**0.5  # Kolmogorov-Smirnov at 1 %
        t = CFMLikelihood(1, on_grid=True).record(policy, cond, chain, Key(0, "a"), ids).t
        values, counts = t.unique(return_counts=True)
        torch.testing.assert_close(values, torch.arange(5, dtype=t.dtype) / 5)
        assert int(counts.min()) > 340

    def test_cost_s_rows_while_sampling_and_three_s_in_an_epoch(self, make):
        parts = make(steps=NoSteps(), likelihood=MEAN, epochs=2)
        parts.iterate(0)
        assert parts.policy.network_cost == 16 * (5 + 4) + 2 * 3 * 16 * 4


class TestGradient:
    """The theorem that FPO rests on, per sample and per draw alike."""

    @pytest.mark.parametrize("joint", [True, False])
    @pytest.mark.parametrize("objective", [Clip, SPO, ASPO])
    @pytest.mark.parametrize("micro_batch", [3, 5, 1000])
    def test_at_unchanged_weights_is_the_advantage_times_that_of_the_loss(
        self, make, gradient, joint, objective, micro_batch
    ):
        likelihood = CFMLikelihood(4, joint=joint)
        parts = make(steps=NoSteps(), likelihood=likelihood, micro_batch=micro_batch, objective=objective)
        rollout = parts.collect()
        found, _ = gradient(parts, rollout)
        advantage = parts.algorithm.advantage(rollout, None, None).advantage[0]
        cond = parts.policy.encode(rollout.flat(rollout.obs))
        loss = losses(parts.policy, rollout.evidence, cond).mean(1)
        assert float(advantage.abs().max()) > 0.5
        torch.testing.assert_close(found, flat_gradient((advantage * loss).mean(), parts.policy))

    def test_vanishes_in_expectation_where_all_advantages_are_equal(self):
        """The exact velocity of a policy's own samples is a minimum of its loss: 200,000 draws, five standard errors."""
        field = Affine(1.0, 0.5).double()
        policy = FlowPolicy(field, FlowSDE(), num_steps=200).double()
        n = 20_000
        cond, ids = Cond({"pooled": torch.zeros(n, 1, dtype=torch.float64)}), torch.arange(n)
        with torch.no_grad():
            chain = policy.sample(cond, row_ids=ids)
            evidence = CFMLikelihood(10).record(policy, cond, chain, Key(1, "draws"), ids)
        each = -CFMLikelihood(10).score(policy, cond, evidence).log_prob.mean(1)
        grad = torch.autograd.grad(each.mean(), field.mean)[0]
        # d/dmean of one squared error is -2 err x (the exact velocity's derivative), of the order of 1
        assert abs(float(grad)) < 5 * 2 / n**0.5
        assert abs(float(torch.autograd.grad(self._of_a_shifted_field(policy, cond, evidence), field.mean)[0])) > 0.2

    @staticmethod
    def _of_a_shifted_field(policy: FlowPolicy, cond: Cond, evidence: Evidence) -> Tensor:
        with torch.no_grad():
            policy.field.mean += 0.3
        return -CFMLikelihood(10).score(policy, cond, evidence).log_prob.mean()


class Affine(VelocityField):
    """The exact velocity of N(mean, std^2) in one dimension: mean + (t s^2 - (1 - t)) / S_t^2 (x - t mean)."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.event_shape, self.num_features, self.std = (1,), 1, std
        self.mean = nn.Parameter(torch.tensor(mean))

    def encode(self, obs: Tensor) -> Cond:
        return Cond({"pooled": torch.zeros(len(obs), 1, dtype=torch.float64)})

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        t, var = t[:, None], self.std**2
        return self.mean + (t * var - (1 - t)) / ((1 - t) ** 2 + t**2 * var) * (x - t * self.mean)


class TestCalibration:
    """How the surrogate's log-ratio stands to the exact one, on N(m, s^2) -> N(m + d, s^2) with exact velocities.

    The error at the sample m + z and noise e is ((t s^2) e - (1 - t) z) / S_t^2, S_t^2 = (1 - t)^2 + t^2 s^2, so
    E loss = z^2 int (1 - t)^2 / S_t^4 dt + const = z^2 pi / (4 s) + const, against z^2 / (2 s^2): a factor of pi s / 2.
    """

    @staticmethod
    def slope(std: float, likelihood: CFMLikelihood, shift: float = 0.02) -> tuple[float, float]:
        num = 400
        samples = torch.linspace(-2, 2, num, dtype=torch.float64)[:, None] * std
        cond, ids = Cond({"pooled": torch.zeros(num, 1, dtype=torch.float64)}), torch.arange(num)
        old, new = (FlowPolicy(Affine(m, std), FlowSDE(), num_steps=4).double() for m in (0.0, shift))
        with torch.no_grad():
            evidence = likelihood.record(old, cond, chain_of(samples), Key(0, "draws"), ids)
            ratio = likelihood.log_ratio(likelihood.score(new, cond, evidence).log_prob, evidence)[:, 0]
        exact = (samples**2 - (samples - shift) ** 2)[:, 0] / (2 * std**2)
        return calibration(ratio, exact)

    @pytest.mark.parametrize("std", [1.0, 0.5, 0.2])
    def test_of_the_velocity_loss_is_pi_s_over_2(self, std):
        slope, correlation = self.slope(std, CFMLikelihood(2000))
        assert slope == pytest.approx(math.pi * std / 2, rel=0.03)
        assert correlation > 0.99

    @pytest.mark.parametrize("std", [1.0, 0.3])
    def test_of_the_noise_loss_is_the_integral_weighted_by_t_squared(self, std):
        t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        weight = t**2 * (1 - t) ** 2 / ((1 - t) ** 2 + t**2 * std**2) ** 2
        slope, _ = self.slope(std, CFMLikelihood(2000, "eps"))
        assert slope == pytest.approx(2 * std**2 * float(weight.mean()), rel=0.03)

    def test_is_a_slope_through_0_and_a_correlation(self):
        exact = torch.tensor([-1.0, 0.5, 2.0])
        assert calibration(0.3 * exact, exact) == pytest.approx((0.3, 1.0))
        assert calibration(-2 * exact, exact) == pytest.approx((-2.0, -1.0))


class TestTrustRegions:
    """Gradients with respect to the ratio r, clips low .1 and high .2."""

    RATIOS: ClassVar = torch.tensor([0.5, 0.85, 0.95, 1.0, 1.1, 1.15, 1.3, 2.0], dtype=torch.float64)

    def gradient(self, surrogate: Callable[..., Tensor], advantage: float) -> Tensor:
        """d loss / d r."""
        log_ratio = self.RATIOS.log().requires_grad_()
        loss = surrogate(log_ratio, torch.tensor(advantage, dtype=torch.float64), 0.1, 0.2)
        return torch.autograd.grad(loss.sum(), log_ratio)[0] / self.RATIOS

    @pytest.mark.parametrize("surrogate", [clipped_surrogate, asymmetric_surrogate])
    def test_a_good_action_is_held_by_the_clip(self, surrogate):
        expected = -3.0 * (self.RATIOS < 1.2)
        torch.testing.assert_close(self.gradient(surrogate, 3.0), expected.double())

    def test_a_bad_action_is_let_go_of_by_the_clip_and_pulled_back_by_the_others(self):
        clip = self.gradient(clipped_surrogate, -3.0)
        torch.testing.assert_close(clip, 3.0 * (self.RATIOS > 0.9).double())
        for surrogate in (simple_surrogate, asymmetric_surrogate):
            found = self.gradient(surrogate, -3.0)
            torch.testing.assert_close(found, 3.0 + 3.0 * (self.RATIOS - 1) / 0.1)
            assert bool((found[self.RATIOS < 0.9] < 0).all()), "back towards 1"

    @pytest.mark.parametrize(("advantage", "best"), [(2.0, 1.2), (-2.0, 0.9)])
    def test_spo_is_least_at_1_plus_the_clip_on_the_advantages_side(self, advantage, best):
        ratio = torch.linspace(0.5, 1.5, 1001, dtype=torch.float64)
        loss = simple_surrogate(ratio.log(), torch.tensor(advantage, dtype=torch.float64), 0.1, 0.2)
        assert float(ratio[loss.argmin()]) == pytest.approx(best, abs=1e-3)
        left, right = (loss.argmin() - 1, loss.argmin() + 1)
        assert all(a > b for a, b in pairwise(loss[: left + 1]))
        assert all(a < b for a, b in pairwise(loss[right:]))

    @pytest.mark.parametrize("surrogate", [clipped_surrogate, simple_surrogate, asymmetric_surrogate])
    def test_all_agree_at_1(self, surrogate):
        at_1 = self.RATIOS == 1
        assert self.gradient(surrogate, 1.5)[at_1] == -1.5
        assert self.gradient(surrogate, -1.5)[at_1] == 1.5


class TestChunks:
    def test_an_action_never_carried_out_has_no_loss_and_the_first_ratio_stays_1(self, make):
        policy, likelihood = make("reach").policy, CFMLikelihood(4, reduce="sum", joint=False)
        evidence, cond = record(policy, likelihood)
        cut = likelihood.executed(evidence, torch.tensor([2, 1] * 3))
        score = likelihood.score(policy, cond, cut)
        assert not likelihood.log_ratio(score.log_prob, cut).any()
        assert torch.equal(cut.old_log_prob[::2], evidence.old_log_prob[::2])
        first = (evidence.old_mean - (evidence.x_next - evidence.x))[1::2, :, 0].square().sum(-1)
        torch.testing.assert_close(cut.old_log_prob[1::2], -first)


class TestRefusals:
    def guided(self) -> VelocityField:
        return CFG(MLPField(4, (2,), width=8), 3.0)

    def test_a_guided_field_unless_allowed(self, make):
        with pytest.raises(ValueError, match=r"guided field is not .* use guidance=null, or likelihood\.allow_guided"):
            make(steps=NoSteps(), likelihood=MEAN, field=self.guided())
        parts = make(steps=NoSteps(), likelihood=CFMLikelihood(4, allow_guided=True), field=self.guided())
        assert parts.iterate(0)["policy/first_log_ratio_max"] == 0

    def test_the_loss_of_a_guided_policy_is_of_the_field_inside(self, make):
        policy = make(field=self.guided()).policy
        evidence, cond = record(policy, CFMLikelihood(4, allow_guided=True))
        torch.testing.assert_close(evidence.old_log_prob, -losses(policy, evidence, cond))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"objective": Guard}, r"GRPO-Guard .* use objective=clip"),
            ({"kl": KL(0.1, "released")}, r"released KL is of denoising steps.*use kl\.kind=exact"),
            ({"entropy": 0.1}, r"no density.*use entropy=0"),
        ],
    )
    def test_what_is_of_denoising_steps(self, make, settings: dict[str, Any], message: str):
        with pytest.raises(ValueError, match=message):
            make(kernel="learned", steps=NoSteps(), likelihood=PER_DRAW, **settings)

    def test_no_draws_and_rows_that_would_be_all_the_same(self, make):
        with pytest.raises(ValueError, match="draws must be at least 1"):
            CFMLikelihood(0)
        with pytest.raises(ValueError, match=r"differ in nothing .*use shared_noise=false"):
            make(steps=NoSteps(), likelihood=MEAN, collector={"shared_noise": True})


class TestTerms:
    @pytest.mark.parametrize("kind", ["exact", "velocity"])
    def test_the_kl_is_the_squared_difference_of_velocities(self, make, kind):
        parts = make(steps=NoSteps(), likelihood=PER_DRAW, kl=KL(0.1, kind), epochs=2)
        assert parts.iterate(0)["kl/ref"] > 0
        rollout = parts.collect(1)
        batch = parts.algorithm._prepare(rollout)
        evidence, cond = batch.evidence, batch.cond(torch.arange(16))
        with torch.no_grad():
            score = PER_DRAW.score(parts.policy, cond, evidence)
        with parts.policy.using("ref"), torch.no_grad():
            ref = PER_DRAW.score(parts.policy, cond, evidence)
        found = reference_kl(kind, score.dist, evidence, "mean", PER_DRAW.gain(parts.policy, evidence))
        torch.testing.assert_close(found, (score.dist.mean - ref.dist.mean).square().mean(-1))

    @pytest.mark.parametrize("steps", [NoSteps(), AllButLast(), All()], ids=repr)
    def test_samples_may_come_from_any_plan(self, make: Callable[..., Any], steps):
        parts = make("reach", steps=steps, likelihood=PER_DRAW, advantage=GAE(), epochs=2)
        assert parts.iterate(0)["policy/first_log_ratio_max"] <= 1e-14
