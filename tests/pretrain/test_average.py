"""Average velocities: the identities on an exact mixture flow, their limits, what is clamped, and what is learnt."""

import dataclasses

import pytest
import torch
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.flow.matching import ShortcutLoss, cfm_loss
from rlflow.pretrain.average import (
    AlphaFlow,
    MeanFlow,
    Span,
    SplitMeanFlow,
    TargetGuidance,
    by_derivative,
    low_digits,
    steps,
)
from rlflow.types import Cond

MEANS, STDS, WEIGHTS = torch.tensor([[-1.0, 1.5], [0.3, 0.5], [0.4, 0.6]], dtype=torch.float64)
LOSSES = [MeanFlow(), SplitMeanFlow(), AlphaFlow()]


def at(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(share, deviation) (N, 2) of each mode at x, t (N,)."""
    std = ((1 - t[:, None]) ** 2 + (t[:, None] * STDS) ** 2).sqrt()
    return std, (x[:, None] - t[:, None] * MEANS) / std


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[x_1 - x_0 | x_t = x] (N,)."""
    std, gap = at(x, t)
    weight = torch.softmax(WEIGHTS.log() - 0.5 * gap**2 - std.log(), -1)
    return (weight * (MEANS + (t[:, None] * STDS**2 - (1 - t[:, None])) / std * gap)).sum(-1)


class Flow(VelocityField):
    """The exact average velocity of the mixture, differentiable in everything.

    In one dimension the flow keeps the cumulative probability, so it leads to the quantile at the end: by bisection
    and one Newton step, whose derivatives are those of the quantile. `moving` makes it forget that dt shrinks.
    """

    event_shape, uses_dt = (1,), True

    def forward(self, x, t, dt, cond):
        x = x[:, 0]
        share = self.cumulative(x, t)
        end = t + dt
        low, high = torch.full_like(x, -12).detach(), torch.full_like(x, 12).detach()
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cumulative(middle, end) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        std, gap = at(middle, end)
        density = (WEIGHTS * torch.exp(-0.5 * gap**2) / std).sum(-1) / (2 * torch.pi) ** 0.5
        there = middle + (share - self.cumulative(middle, end)) / density
        still = dt == 0
        return torch.where(still, velocity(x, t), (there - x) / torch.where(still, 1, dt))[:, None]

    @staticmethod
    def cumulative(x: Tensor, t: Tensor) -> Tensor:
        _, gap = at(x, t)
        return (WEIGHTS * torch.special.ndtr(gap)).sum(-1)


def cond(num: int) -> Cond:
    return Cond({"pooled": torch.zeros(num, 1)})


def spans(num: int = 64) -> Span:
    """Steps of the mixture's flow, with its exact velocity as v."""
    rng = torch.Generator().manual_seed(0)
    t, end = torch.rand((2, num), generator=rng, dtype=torch.float64).sort(0).values * 0.9
    mode = (torch.rand(num, generator=rng) < 0.6).long()
    x_0, z = torch.randn((2, num), generator=rng, dtype=torch.float64)
    x = (1 - t) * x_0 + t * (MEANS[mode] + STDS[mode] * z)
    return Span(x[:, None], t, end - t, velocity(x, t)[:, None], cond(num))


def answer(span: Span) -> Tensor:
    return Flow()(span.x, span.t, span.dt, span.cond)


def off(target: Tensor, span: Span) -> float:
    return float((target - answer(span)).abs().max())


class TestIdentities:
    def test_mean_flow_is_exact(self):
        span = spans()
        assert off(by_derivative(Flow(), span), span) < 1e-7

    def test_a_wrong_sign_and_a_moving_end_are_seen(self):
        span = spans()
        along = by_derivative(Flow(), span) - span.v
        assert off(span.v - along, span) > 0.5
        one, rest = torch.ones_like(span.t), torch.zeros_like(span.t)
        _, slope = torch.func.jvp(lambda *a: Flow()(*a, span.cond), (span.x, span.t, span.dt), (span.v, one, rest))
        assert off(span.v + span.dt[:, None] * slope, span) > 0.5

    @pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 1.0])
    def test_split_is_exact_wherever_it_is_split(self, where):
        span = spans()
        assert off(SplitMeanFlow.split(Flow(), span, torch.full_like(span.t, where)), span) < 1e-7

    def test_alpha_flow_is_off_by_alpha_squared(self):
        span = spans()
        errors = [off(AlphaFlow.blend(Flow(), span, a), span) for a in (0.02, 0.01)]
        assert errors[0] / errors[1] == pytest.approx(4, abs=0.2)
        assert errors[1] < 1e-2

    def test_alpha_flow_over_alpha_tends_to_mean_flow_like_alpha(self):
        """For a field that is not right: the loss divided by alpha has MeanFlow's gradient in the limit."""
        span = spans()
        span = dataclasses.replace(span, v=span.v + 0.3)
        u, limit = answer(span), by_derivative(Flow(), span)
        away = [((AlphaFlow.blend(Flow(), span, a) - u) / a + u - limit).abs().max() for a in (0.02, 0.01)]
        assert float(away[0] / away[1]) == pytest.approx(2, abs=0.1)

    def test_split_near_the_start_is_mean_flow(self):
        """(target - u) / share is the derivative along the answer at dt = 0, by finite difference."""
        span, small = spans(), 1e-4

        class Off(Flow):
            def forward(self, x, t, dt, cond):
                return super().forward(x, t, dt, cond) + 0.3 * dt[:, None] * x

        u = Off()(span.x, span.t, span.dt, span.cond)
        found = (SplitMeanFlow.split(Off(), span, torch.full_like(span.t, small)) - u) / small
        assert float((found - (by_derivative(Off(), span) - u)).abs().max()) < 1e-2

    def test_alpha_of_one_is_matching_along_the_trajectory(self):
        span = spans()
        torch.testing.assert_close(AlphaFlow.blend(Flow(), span, 1.0), span.v, rtol=0, atol=0)

    def test_halves_are_the_shortcut_target(self):
        """SplitMeanFlow as it stands; AlphaFlow with the first half's average in the place of v."""
        span = spans()
        halves = ShortcutLoss(2**20).two_halves(Flow(), span.x, span.t, span.dt, span.cond)
        torch.testing.assert_close(SplitMeanFlow.split(Flow(), span, torch.full_like(span.t, 0.5)), halves)
        first = dataclasses.replace(span, v=Flow()(span.x, span.t, span.dt / 2, span.cond))
        torch.testing.assert_close(AlphaFlow.blend(Flow(), first, 0.5), halves)


class Told(VelocityField):
    """Velocities that the condition tells, and those of no condition."""

    event_shape, uses_dt, unknown = (2,), True, 0.5

    def null(self, cond):
        return Cond({"pooled": torch.full_like(cond["pooled"], self.unknown)})

    def forward(self, x, t, dt, cond):
        return cond["pooled"].expand_as(x)


class TestGuidance:
    """Of velocities of mean 2 under the condition, .5 without."""

    v = 2 + torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = t = torch.zeros(4000, 2, dtype=torch.float64)

    def target(self, guidance: TargetGuidance, right: float) -> Tensor:
        told = Cond({"pooled": torch.full((4000, 1), right, dtype=torch.float64)})
        return guidance.velocity(Told(), self.x, self.t[:, 0], self.v, told)

    def test_released_guidance_guides_nothing(self):
        """What is right stays right; only the target's variance grows, fourfold."""
        found = self.target(TargetGuidance(2.0, released=True), right=2.0)
        assert float(found.mean()) == pytest.approx(2, abs=0.05)
        assert float(found.var() / self.v.var()) == pytest.approx(4, rel=1e-6)
        assert torch.equal(found, 2 * self.v - 2)

    @pytest.mark.parametrize(("scale", "mix"), [(1.0, 0.0), (2.0, 0.0), (1.5, 0.25)])
    def test_what_is_right_is_the_guided_velocity(self, scale, mix):
        """w / (1 - k) of the condition, and the rest of none."""
        w = scale / (1 - mix)
        guided = w * 2 + (1 - w) * 0.5
        found = self.target(TargetGuidance(scale, mix), right=guided)
        assert float(found.mean()) == pytest.approx(guided, abs=0.06)

    def test_rows_without_a_condition_stay(self):
        found = TargetGuidance(3.0).velocity(Told(), self.x, self.t[:, 0], self.v - 1.5, Told().null(cond(4000)))
        assert float(found.mean()) == pytest.approx(0.5, abs=0.06)

    def test_a_loss_learns_the_guided_velocity_in_every_row(self):
        net, (x_1, c, x_0, t) = Line(), drawn()
        net.null = lambda cond: cond
        plain, guided = (
            dataclasses.replace(MeanFlow(warm_up=0.9), guidance=g).at(0.0, net)(net, x_1, c, x_0, t)
            for g in (None, TargetGuidance(2.0, released=True))
        )
        u = Steady(net)(x_0 + t[:, None] * (x_1 - x_0), t, 0 * t, c)
        torch.testing.assert_close(guided, (2 * (x_1 - x_0 - u)).square().mean(1))
        torch.testing.assert_close(guided, 4 * plain)

    def test_settings_that_guide_nothing_are_refused(self):
        for wrong in ({"scale": 0.0}, {"mix": 1.0}):
            with pytest.raises(ValueError, match="guidance needs scale > 0 and 0 <= mix < 1"):
                TargetGuidance(**wrong)


class Line(VelocityField):
    """u = a (x + t + dt), with a trainable number; keeps what it was asked."""

    event_shape, uses_dt = (2,), True

    def __init__(self, a: float = 0.5) -> None:
        super().__init__()
        self.a, self.asked = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64)), []

    def forward(self, x, t, dt, cond):
        self.asked.append((t, dt))
        return self.a * (x + t[:, None] + dt[:, None])


def drawn(num: int = 64) -> tuple[Tensor, Cond, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x_1, x_0 = torch.randn((2, num, 2), generator=rng, dtype=torch.float64)
    return x_1, cond(num), x_0, torch.rand(num, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda v: type(v).__name__)
class TestFamily:
    def test_rows_beyond_the_share_are_flow_matching(self, loss):
        field, (x_1, c, x_0, t) = Line(), drawn()
        found = loss.at(0.5, Line(0.2))(field, x_1, c, x_0, t)
        torch.testing.assert_close(found[32:], cfm_loss(Steady(field), x_1, c, x_0, t)[32:])

    def test_the_target_has_no_gradient_and_lags_where_it_may(self, loss):
        """The gradient by hand, with the target held: of the average for sums, of the live weights for derivatives."""
        field, teacher, (x_1, c, x_0, t) = Line(), Line(0.2), drawn()
        loss.at(0.5, teacher)(field, x_1, c, x_0, t)[:32].mean().backward()
        start, dt = steps(t, 32)
        x = (1 - start[:, None]) * x_0 + start[:, None] * x_1
        span = Span(x[:32], start[:32], dt[:32], (x_1 - x_0)[:32], c)
        assert loss.lagging == isinstance(loss, SplitMeanFlow)
        target = loss.target(0.5, teacher if loss.lagging else Line(), span).detach()
        basis = span.x + (span.t + span.dt)[:, None]
        expected = (2 * (0.5 * basis - target) * basis).mean() * loss.weight(0.5)
        torch.testing.assert_close(field.a.grad, expected)
        assert teacher.a.grad is None

    def test_targets_lead_no_further_than_data_and_noise_reach(self, loss):
        """A teacher gone wild cannot pull the field after it; without a bound it can."""
        x_1, c, x_0, t = drawn()
        start, dt = steps(t, 64)
        span = Span(x_0 + start[:, None] * (x_1 - x_0), start, dt, x_1 - x_0, c)
        wild = loss.target(0.5, Line(100.0), span)
        reach = ((1 - start - dt) * 4 + (start + dt) * 1.5)[:, None] + 1e-9
        held = dataclasses.replace(loss, bound=1.5)._clamped(span, wild)
        assert bool(((span.x + dt[:, None] * held).abs() <= reach).all())
        assert bool(((span.x + dt[:, None] * wild).abs() > reach).any())
        assert torch.equal(loss._clamped(span, wild), wild)

    def test_one_pass_asks_inside_the_interval(self, loss):
        """Starts before ends, none outside [0, 1], half of the rows at dt = 0."""
        field, (x_1, c, x_0, t) = Line(), drawn()
        loss.at(0.5, Line())(field, x_1, c, x_0, t)
        start, dt = field.asked[-1]
        assert float(start.min()) >= 0
        assert float((start + dt).max()) <= 1
        assert bool((dt[:32] > 0).all())
        assert not dt[32:].any()

    def test_in_the_warm_up_every_row_matches(self, loss):
        field, (x_1, c, x_0, t) = Line(), drawn()
        warm = dataclasses.replace(loss, warm_up=0.2)
        torch.testing.assert_close(warm.at(0.1, field)(field, x_1, c, x_0, t), cfm_loss(Steady(field), x_1, c, x_0, t))

    def test_the_published_weight_divides_by_the_error(self, loss):
        field, batch = Line(), drawn()
        plain = loss.at(0.5, Line(0.2))(field, *batch)
        raw = plain / torch.where(torch.arange(64) < 32, loss.weight(0.5), 1)
        found = dataclasses.replace(loss, power=0.5).at(0.5, Line(0.2))(field, *batch)
        torch.testing.assert_close(found, plain / (raw + 1e-3).sqrt())

    def test_a_field_that_does_not_read_dt_is_refused(self, loss):
        with pytest.raises(ValueError, match="Steady does not read dt: build it with average=True"):
            loss.at(0.0, Line())(Steady(Line()), *drawn())


class Steady(VelocityField):
    """The instantaneous velocity of a field."""

    def __init__(self, field: VelocityField):
        super().__init__()
        self.field = field

    def forward(self, x, t, dt, cond):
        return self.field(x, t, 0 * dt, cond)


def test_alpha_falls_from_1_to_0_and_is_exact_at_both_ends():
    loss = AlphaFlow()
    alphas = [loss.alpha(i / 20) for i in range(21)]
    assert alphas == sorted(alphas, reverse=True)
    assert (alphas[0], alphas[10], alphas[-1]) == (1.0, 0.5, 0.0)
    assert min(a for a in alphas if a) >= 0.05


def test_low_digits_are_even_and_tell_nothing_of_the_times():
    t = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    digits = low_digits(t)
    assert float(digits.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(digits.std()) == pytest.approx(12**-0.5, abs=0.01)
    assert abs(float(torch.corrcoef(torch.stack([digits, t]))[0, 1])) < 0.03


@pytest.mark.parametrize(
    ("setting", "value"), [("share", 0.0), ("share", 1.1), ("warm_up", 1.0), ("bound", 0.0), ("power", -1.0)]
)
def test_refusals(setting, value):
    with pytest.raises(ValueError, match=setting):
        SplitMeanFlow(**{setting: value})
