"""AdaFlow: the spread's loss, and the solver whose rows finish alone, with exact spreads in one dimension."""

import pytest
import torch
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.matching import SpreadLoss, cfm_loss, spread_nll
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import Adaptive, Euler
from rlflow.flow.steps import All, NoSteps
from rlflow.models.mlp import MLPField
from rlflow.types import Cond

POINTS = torch.tensor([-1.0, 1.0], dtype=torch.float64)


class Exact(VelocityField):
    """Velocity and spread of a mixture of normals of one std, in one dimension; std 0 is points."""

    event_shape, num_features, has_spread = (1,), 1, True

    def __init__(self, means: Tensor, std: float = 0.0) -> None:
        super().__init__()
        self.means, self.std = torch.nn.Parameter(means), std

    def encode(self, obs):
        return Cond({"pooled": obs})

    def with_spread(self, x, t, dt, cond):
        t = t[:, None]
        var = (1 - t) ** 2 + (t * self.std) ** 2
        gap = x - t * self.means
        share = torch.softmax(-0.5 * gap**2 / var, -1)
        data = self.means + t * self.std**2 / var * gap
        within = (1 - t) ** 2 * self.std**2 / var
        mean = (share * data).sum(-1, keepdim=True)
        variance = (share * (data - mean) ** 2).sum(-1, keepdim=True) + within
        return torch.cat([(mean - x) / (1 - t), 0.5 * torch.log(variance / (1 - t) ** 2 + 1e-18)], -1)

    def forward(self, x, t, dt, cond):
        return self.with_spread(x, t, dt, cond)[:, :1]


def sampled(field: VelocityField, solver, num_steps: int, num: int = 400) -> tuple[Tensor, float]:
    """(samples (N,) from quantiles of the noise, network rows of one of them)."""
    policy = FlowPolicy(field, FlowSDE(), solver, num_steps=num_steps)
    u = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    x_0 = torch.special.ndtri(u)[:, None]
    with torch.no_grad():
        found = policy.sample(policy.encode(torch.zeros(num, 1)), x_0=x_0).final[:, 0]
    return found, policy.network_rows / num


class TestExact:
    def test_one_point_takes_one_call_and_is_reached(self):
        found, calls = sampled(Exact(torch.tensor([0.5], dtype=torch.float64)), Adaptive(0.1), 10)
        assert calls == 1
        assert float((found - 0.5).abs().max()) < 1e-7

    @pytest.mark.parametrize(("eta", "calls", "error"), [(0.3, 1, 0.38), (0.1, 6, 0.075), (0.03, 21, 0.023)])
    def test_broad_data_take_steps_as_eta_says(self, eta, calls, error):
        """N(.5, .3^2): the rms error falls like eta, and calls rise like 1 / eta."""
        field = Exact(torch.tensor([0.5], dtype=torch.float64), 0.3)
        found, taken = sampled(field, Adaptive(eta), 1000)
        wanted, _ = sampled(field, Euler(), 1000)
        assert taken == pytest.approx(calls, rel=0.4)
        assert float((found - wanted).square().mean().sqrt()) < 1.5 * error

    def test_two_points_take_fewer_calls_for_less_error(self):
        """Calls are spent where the noise has not yet chosen."""
        found, calls = sampled(Exact(POINTS), Adaptive(0.1), 100)
        fixed, _ = sampled(Exact(POINTS), Euler(), 4)

        def away(x: Tensor) -> float:
            return float((x.abs() - 1).abs().mean())

        assert calls < 12
        assert away(found) < away(fixed)

    def test_a_large_eta_is_one_step_and_a_small_one_the_plans(self):
        field = Exact(POINTS, 0.2)
        once, plan = sampled(field, Euler(), 1)[0], sampled(field, Euler(), 7)[0]
        assert sampled(field, Adaptive(1e6), 7)[1] == 1
        torch.testing.assert_close(sampled(field, Adaptive(1e6), 7)[0], once)
        assert sampled(field, Adaptive(1e-9), 7)[1] == pytest.approx(7, abs=0.01)
        torch.testing.assert_close(sampled(field, Adaptive(1e-9), 7)[0], plan)


def policy(num_steps: int = 10) -> FlowPolicy:
    """A random network whose spreads differ by row."""
    field = MLPField(2, (2, 3), width=32, spread=True)
    torch.nn.init.normal_(field.spread_head[-1].weight, std=1.0)
    return FlowPolicy(field.requires_grad_(False), FlowSDE(), Adaptive(0.1), num_steps=num_steps)


def test_a_rows_result_does_not_depend_on_the_batch():
    """Bit for bit, though the others finish earlier or later."""
    made, obs, key = policy(), torch.randn(33, 2), Key(0, "x")
    together = made.sample(made.encode(obs), key=key).final
    assert 33 < made.network_rows < 330
    for i in (0, 7, 32):
        alone = made.sample(made.encode(obs[i : i + 1]), key=key, row_ids=torch.tensor([i])).final
        assert torch.equal(alone[0], together[i])


def test_a_row_at_the_data_moves_no_more_and_is_not_called():
    field = policy().field
    x, t = torch.randn(4, 2, 3), torch.zeros(4)
    cond, asked = field.encode(torch.randn(4, 2)), []

    def velocity(x, t, dt, cond):
        asked.append(len(x))
        return field.with_spread(x, t, dt, cond)

    reached = torch.tensor([1.0, 0.5, 1.0, 0.9])
    x_next, then = Adaptive(0.1)(velocity, x, t, t + 0.1, cond, reached)
    assert asked == [2]
    assert torch.equal(x_next[[0, 2]], x[[0, 2]])
    assert bool((then >= reached).all())
    x_same, then = Adaptive(0.1)(velocity, x, t, t + 0.1, cond, torch.ones(4))
    assert asked == [2]
    assert x_same is x


class TestRefusals:
    def test_a_field_without_a_head(self):
        with pytest.raises(ValueError, match="Adaptive needs a spread head, MLPField has none"):
            FlowPolicy(MLPField(2, (2, 3)), FlowSDE(), Adaptive())
        with pytest.raises(NotImplementedError, match="spread=True"):
            MLPField(2, (3,)).with_spread(
                torch.zeros(1, 3), torch.zeros(1), torch.zeros(1), Cond({"pooled": torch.zeros(1, 2)})
            )

    def test_scored_steps(self):
        policy().check_steps(NoSteps())
        with pytest.raises(ValueError, match="times of its own, which cannot be scored"):
            policy().check_steps(All())

    def test_eta(self):
        with pytest.raises(ValueError, match="eta must be positive"):
            Adaptive(0.0)


class TestLoss:
    def test_its_optimum_is_the_root_mean_square_error(self):
        error = torch.rand(1000, dtype=torch.float64)
        best = 0.5 * error.mean().log()
        log_s = best.clone().requires_grad_()
        spread_nll(error, log_s.expand(1000)).mean().backward()
        assert abs(log_s.grad.item()) < 1e-12
        assert spread_nll(error, best).mean() < spread_nll(error, best + 0.1).mean()

    @pytest.mark.parametrize("published", [False, True])
    def test_a_sum_over_the_event_makes_the_spread_larger_by_the_root_of_its_size(self, published):
        class Told(MLPField):
            """A velocity of 0, and a spread that is the same everywhere."""

            def with_spread(self, x, t, dt, cond):
                return torch.cat([torch.zeros(len(x), 6), log_s.expand(len(x), 1)], -1)

        x_1, x_0, t = torch.randn(500, 2, 3), torch.randn(500, 2, 3), torch.rand(500)
        mean = (x_1 - x_0).square().mean()
        log_s = (0.5 * torch.log(6 * mean if published else mean)).requires_grad_()
        cond = Cond({"pooled": torch.zeros(500, 2)})
        SpreadLoss(published)(Told(2, (2, 3)), x_1, cond, x_0, t).mean().backward()
        assert abs(log_s.grad.item()) < 1e-5

    def test_the_velocity_is_learnt_as_without_a_head(self):
        field = MLPField(2, (2, 3), width=16, spread=True)
        x_1, x_0, t, cond = torch.randn(8, 2, 3), torch.randn(8, 2, 3), torch.rand(8), field.encode(torch.randn(8, 2))
        SpreadLoss()(field, x_1, cond, x_0, t).mean().backward()
        grads = [p.grad.clone() for p in field.net.parameters()]
        assert any(p.grad.abs().sum() > 0 for p in field.spread_head.parameters())
        field.zero_grad()
        cfm_loss(field, x_1, cond, x_0, t).mean().backward()
        for a, p in zip(grads, field.net.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad)

    def test_one_pass_gives_the_velocity_of_forward(self):
        field = MLPField(2, (2, 3), width=16, spread=True)
        x, t, cond = torch.randn(5, 2, 3), torch.rand(5), field.encode(torch.randn(5, 2))
        told = field.with_spread(x, t, 0 * t, cond)
        assert torch.equal(told[:, :-1].reshape(x.shape), field(x, t, 0 * t, cond))
        assert bool((told[:, -1] > MLPField.MIN_LOG_SPREAD).all())
        assert MLPField(**field.args).has_spread
