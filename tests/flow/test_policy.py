"""FlowPolicy: one transition for sampling and scoring, noise by key, shared prefixes, gradients, and refusals.

Bitwise statements hold for equal row batches on the CPU. Matrix products round by batch shape, so the same row in
another batch agrees to a few units in the last place: 1e-14 in float64, 1e-6 in float32.
"""

import pytest
import torch
from torch import Tensor, nn

from rlflow.flow.field import VelocityField
from rlflow.flow.gaussian import Gaussian
from rlflow.flow.grid import FromSigmas, Shifted, Uniform
from rlflow.flow.guidance import CFG
from rlflow.flow.kernels import CPS, Ancestral, ConstantSDE, FlowSDE, Kernel, LearnedNoise
from rlflow.flow.noise import Key, noise
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import DPMSolver2M, Euler, FireFlow, Heun, Midpoint, Solver
from rlflow.flow.squash import Tanh
from rlflow.flow.steps import (
    All,
    AllButLast,
    Fraction,
    LastN,
    NoSteps,
    OneRandom,
    Plan,
    RandomWindow,
    Steps,
    Window,
)
from rlflow.models.mlp import MLPField
from rlflow.types import Chain, Cond

K, N, EVENT = 8, 6, (2, 3)
KEY = Key(5, "sample", iteration=2)
KERNELS = ["flow", "constant", "cps", "ancestral", "learned"]
PLANS = [
    AllButLast(2),
    LastN(3, skip_last=1),
    Window(size=3),
    Window(size=2, every=1, compress=0.5),
    RandomWindow(2),
    OneRandom(),
    Fraction(0.5),
]


class Spy(MLPField):
    """An MLPField that keeps the (t, dt) and number of rows of every call."""

    def __init__(self, **kwargs: bool):
        super().__init__(4, EVENT, width=24, **kwargs)
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        self.asked.append((t, dt))
        return super().forward(x, t, dt, cond)


def named(part: object) -> str:
    return type(part).__name__


def kernel_of(name: str) -> Kernel:
    if name == "learned":
        kernel = LearnedNoise(4, EVENT, std_min=0.1, std_max=0.4)
        nn.init.normal_(kernel.net[-1].weight, std=0.3)
        return kernel
    return {"flow": FlowSDE(0.7), "constant": ConstantSDE(0.3), "cps": CPS(0.7), "ancestral": Ancestral(0.6)}[name]


def build(kernel: str = "flow", solver: Solver | None = None, average: bool = False, **kwargs: object) -> FlowPolicy:
    policy = FlowPolicy(Spy(average=average), kernel_of(kernel), solver, Shifted(2.0), K, **kwargs)
    return policy.double().requires_grad_(False)


def condition(policy: FlowPolicy, num: int = N) -> Cond:
    return policy.encode(torch.randn(num, 4, generator=torch.Generator().manual_seed(1)))


def draw(policy: FlowPolicy, steps: Steps, num: int = N, iteration: int = 3, **kwargs: object) -> Chain:
    plan = steps(iteration, policy.grid(K), kwargs.get("row_ids", torch.arange(num)))
    return policy.sample(condition(policy, num), plan, key=KEY, **kwargs)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def same(a: Chain, b: Chain) -> bool:
    names = ["final", "x", "x_next", "t", "t_next", "mean", "std"]
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("average", [False, True], ids=["velocity", "average"])
class TestTransition:
    def test_is_the_kernel_of_the_fields_velocity_at_the_dt_the_kernel_asks_for(self, kernel, average):
        policy = build(kernel, average=average)
        cond = condition(policy)
        x = torch.randn(N, *EVENT, dtype=torch.float64)
        t, t_next = torch.linspace(0, 0.8, N).double(), torch.linspace(0.1, 0.95, N).double()
        dt = torch.zeros_like(t) if policy.kernel.velocity == "instantaneous" else t_next - t
        dist = policy.transition(x, t, t_next, cond)
        expected = policy.kernel(x, policy.field(x, t, dt, cond), t, t_next, cond["pooled"])
        torch.testing.assert_close(dist.mean, expected.mean, rtol=1e-14, atol=1e-14)  # passes are filled to 4 rows
        torch.testing.assert_close(dist.std, expected.std, rtol=1e-14, atol=1e-14)

    @pytest.mark.parametrize("steps", PLANS, ids=repr)
    def test_of_the_stored_pairs_is_what_was_sampled(self, kernel, average, steps):
        """Exactly, column by column; to rounding when all columns are one batch."""
        policy = build(kernel, average=average)
        chain, cond = draw(policy, steps), condition(policy)
        r = chain.t.shape[1]
        assert r > 0
        for c in range(r):
            dist = policy.transition(chain.x[:, c], chain.t[:, c], chain.t_next[:, c], cond)
            assert torch.equal(dist.mean, chain.mean[:, c])
            assert torch.equal(dist.std, chain.std[:, c])
        flat = [z.flatten(0, 1) for z in (chain.x, chain.t, chain.t_next)]
        dist = policy.transition(*flat, cond.repeat(r))
        close(dist.mean, chain.mean.flatten(0, 1))
        close(dist.std, chain.std.flatten(0, 1))


def assert_consecutive(chain: Chain, plan: Plan) -> None:
    """Column c of a row is its c-th scored step: the states before and after it, and its times."""
    for row in range(N):
        k = (plan.scored[row] if plan.scored.ndim == 2 else plan.scored).nonzero()[:, 0]
        assert torch.equal(chain.x[row], chain.path[row, k])
        assert torch.equal(chain.x_next[row], chain.path[row, k + 1])
        assert torch.equal(chain.t[row], plan.t[k])
        assert torch.equal(chain.t_next[row], plan.t[k + 1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("steps", PLANS, ids=repr)
class TestChain:
    def test_x_next_is_mean_plus_std_times_the_noise_of_its_key(self, kernel, steps):
        policy = build(kernel)
        plan = steps(3, policy.grid(K), torch.arange(N))
        chain = draw(policy, steps)
        scored = plan.scored if plan.scored.ndim == 2 else plan.scored.expand(N, -1)
        for row in range(N):
            for c, k in enumerate(scored[row].nonzero()[:, 0].tolist()):
                z = noise(Key(5, "sample/step", 2, k=k), torch.tensor([row]), EVENT, torch.float64)[0]
                close(chain.x_next[row, c], chain.mean[row, c] + chain.std[row, c] * z)

    def test_pairs_are_consecutive_states_of_the_path(self, kernel, steps):
        policy = build(kernel)
        plan = steps(3, policy.grid(K), torch.arange(N))
        chain = draw(policy, steps, keep_path=True)
        assert chain.path.shape == (N, plan.num_steps + 1, *EVENT)
        assert torch.equal(chain.path_t, plan.t.expand(N, -1))
        assert torch.equal(chain.path[:, -1], chain.final)
        x_0 = noise(Key(5, "sample/x_0", 2), torch.arange(N), EVENT, torch.float64)
        assert torch.equal(chain.path[:, 0], x_0)
        assert_consecutive(chain, plan)

    def test_steps_without_noise_are_the_solvers(self, kernel, steps):
        policy = build(kernel)
        plan = steps(3, policy.grid(K), torch.arange(N))
        path, cond = draw(policy, steps, keep_path=True).path, condition(policy)
        noisy = plan.noisy if plan.noisy.ndim == 2 else plan.noisy.expand(N, -1)
        for k in range(plan.num_steps):
            t, t_next = plan.t[k].expand(N), plan.t[k + 1].expand(N)
            euler, _ = Euler()(policy.velocity, path[:, k], t, t_next, cond, None)
            moved = (path[:, k + 1] - euler).flatten(1).abs().amax(1)
            assert bool((moved[~noisy[:, k]] < 1e-14).all())
            assert bool((moved[noisy[:, k]] > 1e-6).all())

    def test_path_is_kept_on_request_only_and_changes_nothing(self, kernel, steps):
        policy = build(kernel)
        plain = draw(policy, steps)
        assert plain.path is None
        assert plain.path_t is None
        assert same(plain, draw(policy, steps, keep_path=True))


@pytest.mark.parametrize("steps", PLANS, ids=repr)
class TestPurity:
    """A sample is a function of (weights, condition, key, row id)."""

    def test_twice_is_the_same_and_the_global_generator_is_left_alone(self, steps):
        policy = build()
        first = draw(policy, steps)
        torch.manual_seed(123)
        state = torch.get_rng_state()
        assert same(draw(policy, steps), first)
        assert torch.equal(torch.get_rng_state(), state)

    def test_slices_of_the_batch_are_slices_of_the_sample(self, steps):
        policy = build()
        rows = torch.arange(1000, 1012)
        plan = steps(3, policy.grid(K), rows)
        cond = condition(policy, 12)
        whole = policy.sample(cond, plan, key=KEY, row_ids=rows)
        for part in torch.randperm(12).split([5, 1, 4, 2]):
            alone = policy.sample(cond.index(part), steps(3, policy.grid(K), rows[part]), key=KEY, row_ids=rows[part])
            for name in ("final", "x", "x_next", "mean"):
                close(getattr(alone, name), getattr(whole, name)[part])

    def test_another_key_or_row_is_another_sample(self, steps):
        policy = build()
        plan = steps(3, policy.grid(K), torch.arange(N))
        base = policy.sample(condition(policy), plan, key=KEY).final
        others = [KEY._replace(seed=6), KEY._replace(iteration=3), KEY._replace(outer=1), KEY._replace(purpose="eval")]
        finals = [policy.sample(condition(policy), plan, key=k).final for k in others]
        finals.append(policy.sample(condition(policy), plan, key=KEY, row_ids=torch.arange(N) + 50).final)
        assert all(not torch.isclose(f, base).flatten(1).all(1).any() for f in finals)


class TestDeployment:
    @pytest.mark.parametrize("solver", [Euler(), Heun(), Midpoint(), FireFlow(), DPMSolver2M()], ids=named)
    def test_the_default_plan_is_the_solver_on_the_policys_grid(self, solver):
        policy = build(solver=solver)
        cond = condition(policy)
        x, memory = noise(Key(5, "sample/x_0", 2), torch.arange(N), EVENT, torch.float64), None
        grid = policy.grid(K)
        for k in range(K):
            x, memory = solver(policy.velocity, x, grid[k].expand(N), grid[k + 1].expand(N), cond, memory)
        policy.network_rows = 0
        chain = policy.sample(cond, key=KEY)
        assert torch.equal(chain.final, x)
        assert policy.network_rows == N * solver.num_calls(K)
        assert chain.t.shape == chain.t_next.shape == (N, 0)
        assert chain.x.shape == chain.mean.shape == (N, 0, *EVENT)

    def test_runs_at_another_number_of_steps(self):
        policy = build()
        policy.network_rows = 0
        policy.sample(condition(policy), policy.plan(3))
        assert policy.network_rows == 3 * N

    def test_a_given_x_0_is_where_the_chain_starts(self):
        policy = build()
        x_0 = torch.randn(N, *EVENT, dtype=torch.float64)
        a = draw(policy, All(), x_0=x_0, keep_path=True)
        assert torch.equal(a.path[:, 0], x_0)
        assert torch.equal(a.x[:, 0], x_0)

    def test_squash_stays_outside_the_chain(self):
        plain, policy = build(), build(squash=Tanh())
        policy.load_state_dict(plain.state_dict())
        obs = torch.randn(N, 4)
        a, b = (p.sample(plain.encode(obs), key=KEY).final for p in (plain, policy))
        assert torch.equal(a, b)
        assert float(a.abs().max()) > 1

    def test_encoder_rows_are_counted(self):
        policy = build()
        policy.encoder_rows = 0
        policy.encode(torch.randn(N, 4))
        assert policy.encoder_rows == N


class TestPlansMadeByHand:
    def test_noisy_steps_may_be_left_unscored_in_every_row(self):
        policy = build()
        noisy = torch.ones(K, dtype=torch.bool)
        scored = torch.zeros(K, dtype=torch.bool)
        scored[[1, 3]] = True
        plan = Plan(policy.grid(K), scored, noisy)
        chain = policy.sample(condition(policy), plan, key=KEY, keep_path=True)
        assert chain.t.shape == (N, 2)
        assert_consecutive(chain, plan)

    def test_rows_may_have_grids_of_their_own(self):
        """Each row equals the row sampled alone on its grid."""
        policy = build()
        grids = torch.stack([Shifted(1 + 0.5 * i)(K) for i in range(N)])
        scored = torch.arange(K) < 3
        chain = policy.sample(condition(policy), Plan(grids, scored, scored), key=KEY, keep_path=True)
        assert torch.equal(chain.path_t, grids)
        for i in range(N):
            row = torch.tensor([i])
            alone = policy.sample(condition(policy).index(row), Plan(grids[i], scored, scored), key=KEY, row_ids=row)
            close(alone.final, chain.final[row])
            close(alone.mean, chain.mean[row])
            assert torch.equal(alone.t_next, chain.t_next[row])

    def test_rows_that_differ_share_no_prefix_even_where_all_are_silent(self):
        policy = build()
        noisy = torch.zeros(4, K, dtype=torch.bool)
        noisy[[0, 1, 2, 3], [2, 3, 3, 5]] = True
        plan, cond = Plan(policy.grid(K), noisy, noisy), condition(policy, 2)
        shared = policy.sample(cond, plan, key=KEY, copies=2, shared_noise=True)
        x_0 = noise(Key(5, "sample/x_0", 2), torch.tensor([0, 0, 2, 2]), EVENT, torch.float64)
        assert same(shared, policy.sample(cond.repeat(2), plan, key=KEY, x_0=x_0))


class TestSolverMemory:
    def euler_gap(self, steps: Steps, k: int) -> float:
        """How far step k, after a window that is step 3, is from an Euler step."""
        policy = build("ancestral", solver=DPMSolver2M())
        t, cond = steps(3, policy.grid(K), torch.arange(N)).t, condition(policy)
        path = draw(policy, steps, keep_path=True).path
        step, _ = Euler()(policy.velocity, path[:, k], t[k].expand(N), t[k + 1].expand(N), cond, None)
        return float((path[:, k + 1] - step).abs().max())

    @pytest.mark.parametrize("compress", [None, 0.9])
    def test_is_dropped_after_a_scored_step(self, compress):
        """It is there before the window, gone after it, and there again one step later."""
        steps = Window(size=1, every=1, compress=compress)
        assert self.euler_gap(steps, 2) > 1e-6
        assert self.euler_gap(steps, 4) < 1e-14
        assert self.euler_gap(steps, 5) > 1e-6

    def test_is_kept_where_no_step_is_scored(self):
        assert self.euler_gap(NoSteps(), 4) > 1e-6


G = 4
SHARED_PLANS = [
    Window(size=2, every=1),
    Window(size=2, every=1, compress=0.6),
    LastN(2),
    RandomWindow(2, stop=6),
    NoSteps(),
]


class TestSharedNoise:
    """Copies of a row that share x_0 run the steps before the first noisy one once."""

    def shared(self, policy: FlowPolicy, steps: Steps, **kwargs: object) -> Chain:
        plan = steps(3, policy.grid(K), torch.arange(3 * G))
        return policy.sample(condition(policy, 3), plan, key=KEY, copies=G, shared_noise=True, **kwargs)

    def unshared(self, policy: FlowPolicy, steps: Steps, **kwargs: object) -> Chain:
        """The same rows, each with its group's x_0, run separately from the start."""
        plan = steps(3, policy.grid(K), torch.arange(3 * G))
        x_0 = noise(Key(5, "sample/x_0", 2), torch.arange(0, 3 * G, G), EVENT, torch.float64)
        cond = condition(policy, 3).repeat(G)
        return policy.sample(cond, plan, key=KEY, x_0=x_0.repeat_interleave(G, 0), **kwargs)

    @pytest.mark.parametrize("solver", [Euler(), DPMSolver2M(), FireFlow()], ids=named)
    @pytest.mark.parametrize("steps", SHARED_PLANS, ids=repr)
    def test_equals_the_unshared_chain_and_saves_the_prefix(self, solver, steps):
        policy = build("cps", solver=solver)
        plan = steps(3, policy.grid(K), torch.arange(3 * G))
        rows = []
        chains = []
        for run in (self.shared, self.unshared):
            policy.network_rows = 0
            chains.append(run(policy, steps, keep_path=True))
            rows.append(policy.network_rows)
        for name in ("final", "x", "x_next", "mean", "path", "t", "path_t"):
            close(getattr(chains[0], name), getattr(chains[1], name))
        prefix = plan.first_noisy()
        assert prefix > 0
        assert rows[1] - rows[0] == 3 * (G - 1) * solver.num_calls(prefix)

    def test_euler_costs_the_prefix_once_per_row(self):
        policy = build("cps")
        policy.network_rows = 0
        self.shared(policy, LastN(2))
        assert policy.network_rows == 3 * (K - 2) + 3 * G * 2

    @pytest.mark.parametrize("steps", [OneRandom(), Fraction(0.5), All()], ids=repr)
    def test_without_a_common_prefix_nothing_is_shared_but_x_0(self, steps):
        policy = build("learned")
        policy.network_rows = 0
        a = self.shared(policy, steps, keep_path=True)
        assert policy.network_rows == 3 * G * K
        b = self.unshared(policy, steps, keep_path=True)
        assert same(a, b)
        assert torch.equal(a.path, b.path)

    def test_copies_start_together_and_part_at_the_first_noise(self):
        chain = self.shared(build("cps"), LastN(3), keep_path=True)
        groups = chain.path.unflatten(0, (3, G))
        assert torch.equal(groups[:, :, : K - 2], groups[:, :1, : K - 2].expand(-1, G, -1, -1, -1))
        assert not torch.isclose(groups[:, 0, K - 2 :], groups[:, 1, K - 2 :]).any()
        assert not torch.isclose(groups[0, 0, 0], groups[1, 0, 0]).any()

    def test_without_shared_noise_copies_are_separate_rows(self):
        policy = build("cps")
        plan = LastN(2)(0, policy.grid(K), torch.arange(3 * G))
        a = policy.sample(condition(policy, 3), plan, key=KEY, copies=G)
        b = policy.sample(condition(policy, 3).repeat(G), plan, key=KEY)
        assert same(a, b)
        assert len(a.final.flatten(1).unique(dim=0)) == 3 * G

    def test_whole_groups_of_a_larger_batch_are_the_same(self):
        policy = build("cps")
        plan = LastN(2)(0, policy.grid(K), torch.arange(3 * G))
        whole = self.shared(policy, LastN(2))
        part = policy.sample(
            condition(policy, 3).index(torch.tensor([2])),
            plan,
            key=KEY,
            row_ids=torch.arange(2 * G, 3 * G),
            copies=G,
            shared_noise=True,
        )
        close(part.final, whole.final[2 * G :])


class TestStorage:
    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("steps", PLANS, ids=repr)
    def test_what_is_scored_is_representable_and_the_chain_continues_from_it(self, kernel, steps):
        policy = build(kernel, storage_dtype=torch.bfloat16)
        chain = draw(policy, steps, keep_path=True)
        plain = draw(build(kernel), steps)
        assert chain.x_next.dtype == torch.float64
        assert torch.equal(chain.x_next, chain.x_next.bfloat16().double())
        assert not torch.equal(plain.x_next, plain.x_next.bfloat16().double())
        assert_consecutive(chain, steps(3, policy.grid(K), torch.arange(N)))

    def test_so_is_the_state_before_it(self):
        """A pair kept in storage_dtype must give the ratio 1: both of its ends are rounded."""
        chain = draw(build(storage_dtype=torch.bfloat16), Window(size=2))
        assert torch.equal(chain.x, chain.x.bfloat16().double())

    def test_log_prob_is_that_of_the_stored_value(self):
        policy = build(storage_dtype=torch.bfloat16)
        chain = draw(policy, All())
        stored = Gaussian(chain.mean, chain.std).log_prob(chain.x_next.bfloat16(), "sum", batch_dims=2)
        ours = Gaussian(chain.mean, chain.std).log_prob(chain.x_next, "sum", batch_dims=2)
        assert torch.equal(stored, ours)


class TestPrecision:
    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_chain_has_the_dtype_of_the_weights_but_at_least_float32(self, kernel, dtype):
        policy = build(kernel).to(dtype)
        chain = draw(policy, AllButLast(), keep_path=True)
        names = ["final", "x", "x_next", "t", "t_next", "mean", "std", "path", "path_t"]
        assert {getattr(chain, n).dtype for n in names} == {dtype}

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_autocast_stays_inside_the_network(self, kernel):
        """Velocities are bfloat16 numbers; means, stds and states are not."""
        seen = []

        class Cast(Spy):
            def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
                v = super().forward(x, t, dt, cond)
                seen.append(v.dtype)
                return v

        policy = FlowPolicy(Cast(), kernel_of(kernel), None, Shifted(2.0), K, autocast=torch.bfloat16)
        policy.requires_grad_(False)
        chain, cond = draw(policy, AllButLast()), condition(policy)
        assert set(seen) == {torch.bfloat16}
        assert chain.mean.dtype == chain.std.dtype == chain.x_next.dtype == torch.float32
        assert not torch.equal(chain.x_next, chain.x_next.bfloat16().float())
        dist = policy.transition(chain.x[:, 2], chain.t[:, 2], chain.t_next[:, 2], cond)
        assert torch.equal(dist.mean, chain.mean[:, 2])
        dt = policy.kernel_dt(chain.t[:, 2], chain.t_next[:, 2])
        v = policy.velocity(chain.x[:, 2], chain.t[:, 2], dt, cond)
        assert v.dtype == torch.float32
        wide = [z[:, 2].double() for z in (chain.x, chain.t, chain.t_next)]
        exact = policy.kernel.double()(wide[0], v.double(), *wide[1:], cond["pooled"])
        torch.testing.assert_close(dist.mean.double(), exact.mean, rtol=1e-5, atol=1e-5)


class TestGradients:
    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize(
        ("steps", "solver"),
        [
            (AllButLast(), Euler()),
            (Window(size=3, every=1), Euler()),
            (Window(size=3, every=1), Heun()),
            (Window(size=2, every=1, compress=0.6), DPMSolver2M()),
            (OneRandom(), Euler()),
            (Fraction(), Euler()),
        ],
        ids=["all_but_last", "window", "window-heun", "flash-dpm", "one_random", "fraction"],
    )
    def test_flow_through_the_whole_chain(self, kernel, steps, solver):
        """Central differences along one random direction of all weights, the noise net's among them."""
        policy = build(kernel, solver=solver).requires_grad_(True)
        weights = list(policy.parameters())
        direction = [torch.randn_like(p) for p in weights]

        def loss() -> Tensor:
            return draw(policy, steps, num=2).final.square().sum()

        def shifted(by: float) -> float:
            with torch.no_grad():
                for p, d in zip(weights, direction, strict=True):
                    p += by * d
                value = float(loss())
                for p, d in zip(weights, direction, strict=True):
                    p -= by * d
            return value

        gradient = torch.autograd.grad(loss(), weights, allow_unused=True)
        along = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True) if g is not None)
        numeric = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
        assert abs(numeric) > 1e-3
        assert along == pytest.approx(numeric, rel=1e-6)

    def test_reach_the_noise_net(self):
        policy = build("learned").requires_grad_(True)
        draw(policy, All()).final.square().sum().backward()
        assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in policy.kernel.parameters())

    def test_reach_the_condition_and_x_0(self):
        policy = build()
        x_0 = torch.randn(N, *EVENT, dtype=torch.float64, requires_grad=True)
        obs = torch.randn(N, 4, dtype=torch.float64, requires_grad=True)
        plan = AllButLast()(0, policy.grid(K), torch.arange(N))
        policy.sample(policy.encode(obs), plan, x_0=x_0).final.sum().backward()
        assert float(x_0.grad.abs().sum()) > 0
        assert float(obs.grad.abs().sum()) > 0

    def test_pass_the_rounding_of_stored_states_straight_through(self):
        gradients = []
        for storage in (None, torch.bfloat16):
            torch.manual_seed(0)
            policy = build(storage_dtype=storage).requires_grad_(True)
            draw(policy, All()).final.square().sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999
        assert float(gradients[1].norm() / gradients[0].norm()) == pytest.approx(1, abs=0.02)

    def test_are_the_callers_choice(self):
        policy = build().requires_grad_(True)
        assert draw(policy, All()).final.requires_grad
        with torch.no_grad():
            assert not draw(policy, All()).final.requires_grad


def sd3_grid() -> FromSigmas:
    sigmas = torch.linspace(1, 3 * 0.001 / (1 + 2 * 0.001), 10, dtype=torch.float64)
    return FromSigmas([*(3 * sigmas / (1 + 2 * sigmas)).tolist(), 0.0])


class TestCheckSteps:
    def policy(self, kernel: Kernel, num_steps: int = 10, grid: object = None, **kwargs: object) -> FlowPolicy:
        return FlowPolicy(Spy(), kernel, grid=grid or Uniform(), num_steps=num_steps, **kwargs)

    @pytest.mark.parametrize("kernel", [CPS(0.7), Ancestral(0.7)], ids=named)
    def test_a_step_without_noise_cannot_be_scored(self, kernel):
        with pytest.raises(ValueError, match=rf"{named(kernel)} has zero std at step \[9\] of 10.*all_but_last"):
            self.policy(kernel).check_steps(All())
        self.policy(kernel).check_steps(AllButLast())

    @pytest.mark.parametrize("kernel", [CPS(0.7), Ancestral(0.495)], ids=named)
    def test_sd3s_last_two_steps_are_refused(self, kernel):
        policy = self.policy(kernel, grid=sd3_grid())
        with pytest.raises(ValueError, match=r"kappa.* at steps \[8\].*skip_last"):
            policy.check_steps(AllButLast(1))
        policy.check_steps(AllButLast(2))
        policy.check_steps(AllButLast(1), max_kappa=100)

    @pytest.mark.parametrize("steps", [Fraction(skip_last=0), OneRandom(skip_last=0), Window(skip_last=0)], ids=repr)
    def test_a_step_that_is_scored_only_sometimes_counts(self, steps):
        with pytest.raises(ValueError, match="zero std"):
            self.policy(CPS(0.7)).check_steps(steps)

    def test_max_kappa_is_the_limit(self):
        """CPS(.7) has 1.61 at .8 -> .9 of the uniform grid, its largest."""
        policy = self.policy(CPS(0.7))
        policy.check_steps(AllButLast(), max_kappa=1.7)
        with pytest.raises(ValueError, match=r"kappa.* \[1\.6\] at steps \[8\], above 1\.5"):
            policy.check_steps(AllButLast(), max_kappa=1.5)

    def test_a_schedule_is_judged_by_the_noise_it_comes_to(self):
        """kappa of FlowSDE goes like 1 / a where a is small: a tenth of the noise at the end is refused at the start."""
        policy = self.policy(FlowSDE(0.5, hold=0.5, final=0.1), num_steps=4)
        with pytest.raises(ValueError, match="kappa"):
            policy.check_steps(All())
        assert policy.kernel.a == 0.5
        self.policy(FlowSDE(0.5, hold=0.5, final=0.5), num_steps=4).check_steps(All())

    def test_kernels_with_noise_at_the_end_may_score_it(self):
        self.policy(FlowSDE(0.7)).check_steps(All())
        self.policy(FlowSDE(0.7), grid=sd3_grid()).check_steps(All())
        self.policy(LearnedNoise(4, EVENT), num_steps=4).check_steps(All())

    def test_a_small_learned_std_over_a_long_step_is_refused(self):
        with pytest.raises(ValueError, match=r"kappa.*\[20\.0\] at steps \[0\]"):
            self.policy(LearnedNoise(4, EVENT, std_min=0.05), num_steps=1).check_steps(All())

    def test_mixed_rows_need_the_euler_solver(self):
        policy = self.policy(FlowSDE(), solver=Heun())
        with pytest.raises(ValueError, match=r"OneRandom mixes .* solver=euler"):
            policy.check_steps(OneRandom())
        policy.check_steps(Fraction())

    def test_a_window_that_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match="window needs 9 usable"):
            self.policy(FlowSDE()).check_steps(Window(size=9))

    def test_leaves_the_policy_as_it_was(self):
        policy = self.policy(LearnedNoise(4, EVENT), num_steps=4)
        before = {n: (p.data_ptr(), p.dtype) for n, p in policy.named_parameters()}
        policy.check_steps(All())
        assert {n: (p.data_ptr(), p.dtype) for n, p in policy.named_parameters()} == before


class TestMisuse:
    @pytest.mark.parametrize(("num", "copies"), [(1, 1), (3, 4)])
    def test_every_sample_needs_its_row_id(self, num, copies):
        policy = build()
        with pytest.raises(ValueError, match="row_ids"):
            policy.sample(condition(policy, 3), row_ids=torch.arange(num), copies=copies)

    def test_mixed_rows_refuse_another_solver_when_sampled_too(self):
        policy = build(solver=Heun())
        with pytest.raises(ValueError, match="solver=euler"):
            draw(policy, OneRandom())


class FlowMap(VelocityField):
    """An average-velocity field without a dt = 0 branch."""

    event_shape, num_features, uses_dt, has_instantaneous = EVENT, 4, True, False


class TestAverageVelocity:
    @pytest.mark.parametrize("kernel", ["flow", "constant", "cps"])
    @pytest.mark.parametrize("wrap", [lambda f: f, lambda f: CFG(f, 2.0)], ids=["plain", "guided"])
    def test_kernels_with_a_score_refuse_a_field_without_an_instantaneous_velocity(self, kernel, wrap):
        with pytest.raises(ValueError, match="no dt = 0 branch: use kernel=ancestral or kernel=learned_noise"):
            FlowPolicy(wrap(FlowMap()), kernel_of(kernel))

    @pytest.mark.parametrize("solver", [Heun(), Midpoint(), FireFlow(), DPMSolver2M()], ids=named)
    def test_so_do_solvers_of_second_order(self, solver):
        with pytest.raises(ValueError, match=f"{type(solver).__name__} needs a dt = 0 branch.*solver=euler"):
            FlowPolicy(FlowMap(), kernel_of("ancestral"), solver)

    @pytest.mark.parametrize("kernel", ["ancestral", "learned"])
    def test_the_others_take_it(self, kernel):
        FlowPolicy(FlowMap(), kernel_of(kernel))

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("steps", [Window(size=3), OneRandom()], ids=repr)
    def test_dt_is_the_step_where_the_field_may_average_and_0_where_the_score_is_needed(self, kernel, steps):
        policy = build(kernel, average=True)
        plan = steps(3, policy.grid(K), torch.arange(N))
        policy.field.asked.clear()
        draw(policy, steps)
        noisy = plan.noisy if plan.noisy.ndim == 2 else plan.noisy.expand(N, -1)
        zero = noisy & (policy.kernel.velocity == "instantaneous")
        expected = torch.where(zero, 0.0, plan.t.diff().expand(N, -1))
        close(torch.stack([dt[:N] for _, dt in policy.field.asked], 1), expected)  # passes are filled to 4 rows


def test_weight_sets_swap_what_the_transition_reads():
    policy = build("learned").requires_grad_(True)
    policy.weights.snapshot("ref")
    x, t = torch.randn(N, *EVENT, dtype=torch.float64), torch.full((N,), 0.3, dtype=torch.float64)
    cond = condition(policy)

    def both() -> Tensor:
        dist = policy.transition(x, t, t + 0.1, cond)
        return torch.cat([dist.mean, dist.std]).detach()

    before = both()
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.1 * torch.randn_like(p)
    live = both()
    with policy.using("ref") as inside:
        assert inside is policy
        assert torch.equal(both(), before)
    assert torch.equal(both(), live)
    assert not torch.equal(live, before)


def test_a_frozen_encoder_is_told_from_one_that_trains():
    class Encoding(Spy):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(4, 4)

        def encoder_parameters(self) -> list[nn.Parameter]:
            return list(self.embed.parameters())

    assert not FlowPolicy(Spy(), FlowSDE()).encoder_trains
    policy = FlowPolicy(Encoding(), FlowSDE())
    assert policy.encoder_trains
    policy.field.embed.requires_grad_(False)
    assert not policy.encoder_trains
