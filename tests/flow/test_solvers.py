"""ODE solvers: measured order of convergence on a mixture, network calls, memory, and times per row.

A single Gaussian target is too easy (the midpoint rule shows order 3 on it), so the velocity is the exact one of a
two-mode mixture and the reference an adaptive Runge-Kutta method of order 8.
"""

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from rlflow.flow.grid import Shifted, Uniform
from rlflow.flow.solvers import DPMSolver2M, Euler, FireFlow, Heun, Midpoint, Solver, UniPC

MEANS, STDS, WEIGHTS = torch.tensor([[-1.0, 1.5], [0.3, 0.5], [0.4, 0.6]], dtype=torch.float64)
START = torch.linspace(-2, 2, 15, dtype=torch.float64)
ALL = [Euler(), Heun(), Midpoint(), FireFlow(), DPMSolver2M(), UniPC()]


def named(solver: Solver) -> str:
    return type(solver).__name__


def mixture(x: Tensor, t: Tensor, dt: Tensor | None = None, cond: object = None) -> Tensor:
    """Exact velocity E[x_1 - x_0 | x_t] of x, t (N,)."""
    x, t = x[:, None], t[:, None]
    var = (1 - t) ** 2 + (t * STDS) ** 2
    gap = x - t * MEANS
    weight = torch.softmax(WEIGHTS.log() - 0.5 * gap**2 / var - 0.5 * var.log(), -1)
    return (weight * (MEANS + (t * STDS**2 - (1 - t)) / var * gap)).sum(-1)


class Counted:
    """A velocity that counts its calls and keeps the times it was asked for."""

    def __init__(self, velocity=mixture):
        self.velocity, self.asked = velocity, []

    def __call__(self, x: Tensor, t: Tensor, dt: Tensor, cond: object) -> Tensor:
        self.asked.append((t.clone(), dt.clone()))
        return self.velocity(x, t, dt, cond)


def integrate(solver: Solver, grid: Tensor, velocity=mixture, x: Tensor = START) -> Tensor:
    memory = None
    for t, t_next in pairwise(grid):
        x, memory = solver(velocity, x, t.expand(len(x)), t_next.expand(len(x)), None, memory)
    return x


def exact(start: float, end: float) -> Tensor:
    def slope(t: float, x: object) -> object:
        return mixture(torch.as_tensor(x), torch.full((15,), t, dtype=torch.float64)).numpy()

    solution = solve_ivp(slope, (start, end), START.numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
    return torch.as_tensor(solution.y[:, -1])


def grid(start: float, end: float, num_steps: int, even: bool) -> Tensor:
    u = Uniform()(num_steps)
    u = u if even else u + 0.15 * torch.sin(math.pi * u) * u
    return start + (end - start) * u


@pytest.fixture(scope="module")
def reference() -> dict[tuple[float, float], Tensor]:
    return {span: exact(*span) for span in [(0.0, 1.0), (0.1, 0.8)]}


@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
class TestOrder:
    def slope(self, solver: Solver, span: tuple[float, float], even: bool, reference: dict) -> float:
        errors = [
            float((integrate(solver, grid(*span, num, even)) - reference[span]).abs().mean()) for num in (160, 320)
        ]
        return math.log2(errors[0] / errors[1])

    @pytest.mark.parametrize("solver", ALL, ids=named)
    def test_declared_order_inside_the_interval(self, solver, even, reference):
        assert self.slope(solver, (0.1, 0.8), even, reference) == pytest.approx(solver.order, abs=0.05)

    @pytest.mark.parametrize("solver", ALL[:4], ids=named)
    def test_declared_order_from_noise_to_data(self, solver, even, reference):
        assert self.slope(solver, (0.0, 1.0), even, reference) == pytest.approx(solver.order, abs=0.05)

    def test_dpm_solver_from_noise_to_data_is_a_little_below_2(self, even, reference):
        """K^-2 log K: lambda is infinite at both ends."""
        assert 1.7 < self.slope(DPMSolver2M(), (0.0, 1.0), even, reference) < 1.92


def test_second_order_beats_euler_at_few_steps(reference):
    errors = [float((integrate(s, Uniform()(10)) - reference[0.0, 1.0]).abs().mean()) for s in ALL]
    assert all(e < errors[0] / 5 for e in errors[1:])


@pytest.mark.parametrize("solver", ALL, ids=named)
class TestCalls:
    @pytest.mark.parametrize("num_steps", [1, 2, 9])
    def test_are_the_declared_number(self, solver, num_steps):
        velocity = Counted()
        integrate(solver, Uniform()(num_steps), velocity)
        assert len(velocity.asked) == solver.num_calls(num_steps)

    def test_num_calls_by_hand(self, solver):
        nine = {"Euler": 9, "Heun": 18, "Midpoint": 18, "FireFlow": 10, "DPMSolver2M": 9, "UniPC": 9}
        assert solver.num_calls(9) == nine[named(solver)]
        assert solver.num_calls(0) == 0

    def test_never_asks_at_the_data_end_or_outside(self, solver):
        """A velocity may be singular at t = 1."""
        velocity = Counted()
        integrate(solver, Shifted()(7), velocity)
        times = torch.cat([t for t, _ in velocity.asked])
        assert float(times.min()) >= 0
        assert float(times.max()) < 1

    def test_dt_is_the_step_for_euler_and_instantaneous_for_the_others(self, solver):
        velocity = Counted()
        integrate(solver, Uniform()(4), velocity)
        expected = 0.0 if solver.needs_instantaneous else 0.25
        assert all(torch.equal(dt, torch.full((15,), expected, dtype=torch.float64)) for _, dt in velocity.asked)
        assert solver.needs_instantaneous != isinstance(solver, Euler)


@pytest.mark.parametrize("solver", ALL, ids=named)
class TestTimesPerRow:
    def test_rows_with_their_own_grids_equal_rows_alone(self, solver):
        grids = torch.stack([Uniform()(6), Shifted(3.0)(6), Shifted(0.3)(6)])
        x, memory = START[::7].clone(), None
        for k in range(6):
            x, memory = solver(mixture, x, grids[:, k], grids[:, k + 1], None, memory)
        alone = [integrate(solver, g, x=START[::7][i : i + 1]) for i, g in enumerate(grids)]
        torch.testing.assert_close(x, torch.cat(alone), rtol=0, atol=1e-14)

    def test_images_go_through_as_vectors_do(self, solver):
        def linear(x: Tensor, t: Tensor, dt: Tensor, cond: object) -> Tensor:
            return 1.3 - 0.7 * x

        images = START.reshape(5, 3, 1, 1).expand(5, 3, 2, 2).contiguous()
        through = integrate(solver, Uniform()(5), linear, images)
        flat = integrate(solver, Uniform()(5), linear)
        torch.testing.assert_close(through[:, :, 1, 0].flatten(), flat, rtol=0, atol=1e-14)


class TestSteps:
    """Single steps by hand, at x = 0.4 from t = .3 to .5."""

    x, t, t_next = (torch.tensor([z], dtype=torch.float64) for z in (0.4, 0.3, 0.5))

    def v(self, x: Tensor, t: Tensor) -> Tensor:
        return mixture(x, t)

    def test_euler(self):
        x, _ = Euler()(mixture, self.x, self.t, self.t_next, None, None)
        torch.testing.assert_close(x, self.x + 0.2 * self.v(self.x, self.t), rtol=0, atol=1e-15)

    def test_heun(self):
        first = self.v(self.x, self.t)
        second = self.v(self.x + 0.2 * first, self.t_next)
        x, _ = Heun()(mixture, self.x, self.t, self.t_next, None, None)
        torch.testing.assert_close(x, self.x + 0.1 * (first + second), rtol=0, atol=1e-15)

    def test_heun_is_euler_into_the_data(self):
        one = torch.ones(1, dtype=torch.float64)
        a, b = (s(mixture, self.x, self.t, one, None, None)[0] for s in (Heun(), Euler()))
        assert torch.equal(a, b)

    def test_fireflow_without_memory_is_the_midpoint_rule(self):
        a, b = (s(mixture, self.x, self.t, self.t_next, None, None)[0] for s in (FireFlow(), Midpoint()))
        assert torch.equal(a, b)

    def test_fireflow_predicts_with_the_last_midpoint_velocity(self):
        _, memory = FireFlow()(mixture, self.x, self.t, self.t_next, None, None)
        x, _ = FireFlow()(mixture, self.x, self.t, self.t_next, None, memory)
        middle = self.v(self.x + 0.1 * memory, self.t + 0.1)
        torch.testing.assert_close(x, self.x + 0.2 * middle, rtol=0, atol=1e-15)

    def test_dpm_solver_is_the_published_second_order_update(self):
        """alpha = t, sigma = 1 - t: x' = sigma'/sigma x - alpha' (e^-h - 1) D, D = (1 + 1/2r) m - 1/2r m_prev."""
        t_prev = torch.tensor([0.15], dtype=torch.float64)
        m_prev = torch.tensor([0.9], dtype=torch.float64)
        m = self.x + 0.7 * self.v(self.x, self.t)
        lam = [math.log(z / (1 - z)) for z in (0.15, 0.3, 0.5)]
        h, r = lam[2] - lam[1], (lam[1] - lam[0]) / (lam[2] - lam[1])
        drift = (1 + 1 / (2 * r)) * m - 1 / (2 * r) * m_prev
        expected = 0.5 / 0.7 * self.x - 0.5 * (math.exp(-h) - 1) * drift
        x, memory = DPMSolver2M()(mixture, self.x, self.t, self.t_next, None, (m_prev, t_prev))
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(memory[0], m, rtol=0, atol=1e-14)
        assert torch.equal(memory[1], self.t)


class TestDPMSolverIsEulerWhereLambdaIsInfinite:
    def euler_gap(self, k: int, grid: Tensor) -> float:
        """|x_{k+1} - Euler step from x_k| along a DPM-Solver trajectory."""
        x, memory = START, None
        for i in range(k + 1):
            before, t, t_next = x, grid[i].expand(15), grid[i + 1].expand(15)
            x, memory = DPMSolver2M()(mixture, before, t, t_next, None, memory)
        euler, _ = Euler()(mixture, before, t, t_next, None, None)
        return float((x - euler).abs().max())

    @pytest.mark.parametrize("k", [0, 1, 7])
    def test_first_second_and_last_step_of_a_grid_from_0_to_1(self, k):
        assert self.euler_gap(k, Shifted()(8)) < 1e-14

    @pytest.mark.parametrize("k", [2, 3, 6])
    def test_the_others_are_not_euler(self, k):
        assert self.euler_gap(k, Shifted()(8)) > 1e-3

    def test_only_the_first_step_of_an_inner_grid(self):
        inner = 0.1 + 0.7 * Uniform()(8)
        assert self.euler_gap(0, inner) < 1e-14
        assert self.euler_gap(1, inner) > 1e-3

    def test_stays_finite_in_float32_up_to_the_data(self):
        t = Shifted(0.05)(50).float()
        x = integrate(DPMSolver2M(), t, lambda x, t, dt, cond: 1 - x, START.float())
        assert bool(torch.isfinite(x).all())
