"""doctor passes what is right, fails what is broken, and its closed forms are those of the code."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlflow.assembly.parts import make_parts
from rlflow.config import recipes
from rlflow.cost.formula import iteration_cost, solver_calls
from rlflow.doctor import doctor as doctor_module
from rlflow.doctor import examine
from rlflow.doctor.doctor import Check, checks_as_json, doctor, few_rows, print_checks
from rlflow.doctor.examine import calibrated
from rlflow.doctor.probe import Probe, two_passes
from rlflow.flow.gaussian import Gaussian
from rlflow.flow.grid import Shifted, Uniform
from rlflow.flow.kernels import CPS, Ancestral, ConstantSDE, FlowSDE, Kernel, LearnedNoise
from rlflow.flow.marginal import MEAN, STD, end_error, end_moments
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import DPMSolver2M, Euler, FireFlow, Heun, Midpoint, Solver
from rlflow.flow.steps import AllButLast, Fraction, OneRandom, Plan, Window, deterministic
from rlflow.rl.likelihoods.base import Score
from rlflow.rl.likelihoods.chain import ChainLikelihood


def load(tiny: list[str], field: str, *overrides: str, recipe: str = "t2i_flow_grpo"):
    return recipes.load(recipe, [*tiny, f"policy.field={field}", "train.minutes=", "train.iterations=3", *overrides])


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_surrogate_is_calibrated_against_the_exact_ratio_of_its_own_update() -> None:
    """Where the samples' density is known; a chain's ratio is exact as it is."""
    overrides = ["likelihood={name: cfm, draws: 200}", "steps=none", "policy.kernel=flow_sde"]
    config = recipes.load("robot_reach_reinflow", ["env.num_groups=16", "algorithm.micro_batch=4096", *overrides])
    (check,) = calibrated(config, Probe(make_parts(config), 0), False)
    # D = 4 numbers of std near 1: a mean over them, each with a factor of pi / 2
    assert check.value == pytest.approx(math.pi / 2 / 4, rel=0.35)
    assert check.passed is None
    chain = recipes.load("robot_reach_reinflow", ["env.num_groups=16"])
    assert calibrated(chain, Probe(make_parts(chain), 0), False) == []


# -- the whole ------------------------------------------------------------------------------------


def test_a_sound_recipe_passes(tiny: list[str], scenes_field: str) -> None:
    checks = doctor(load(tiny, scenes_field, "algorithm.kl.beta=0.1"))
    assert {c.name for c in checks if c.passed is False} == set()
    found = by_name(checks)
    passed = ("first log-ratio", "log-ratio after one update", "kappa", "gradients not finite", "gradient norm")
    passed += ("resume", "network evaluations", "rewards masked", "two passes", "peak memory, MiB")
    for name in (*passed, "end marginal, training", "end marginal, deployment"):
        assert found[name].verdict == "PASS", name
    assert found["first log-ratio"].value == 0
    assert found["network evaluations"].value == 8 * (6 + 5 + 3 * 5)  # rollout, reference, update
    shares = [c for c in checks if c.name.startswith("time share")]
    assert len(shares) == 4
    rollout, update = found["time share, rollout"].value, found["time share, update"].value
    assert rollout + update == pytest.approx(1)
    assert found["peak memory, MiB"].value > 10
    assert all(c.limit or "no bound: " in c.detail for c in checks), "held to a bound, or the reason why not"


@pytest.mark.parametrize(
    ("recipe", "more"),
    [("t2i_draft", ["algorithm.kl=0.1"]), ("t2i_adjoint", ["algorithm.kl=0"]), ("t2i_draft", [])],
    ids=["kl", "adjoint", "refl"],
)
def test_a_recipe_of_reward_gradients_passes(scenes_field: str, recipe: str, more: list[str]) -> None:
    """The reward's own gradient among the rest; costs are counted for every way back."""
    small = ["policy.num_steps=4", "policy.precision=float32", "reward.weights={brightness: 1}", "eval.num=4"]
    small += [] if more else ["algorithm.through={name: refl, n: 2}"]
    config = recipes.load(
        recipe, [f"policy.field={scenes_field}", "train.minutes=", "train.iterations=3", *small, *more]
    )
    checks = doctor(replace(config, env=replace(config.env, num_groups=6)))
    assert {c.name for c in checks if c.passed is False} == set()
    assert by_name(checks)["reward gradient"].value < 1e-2


def test_a_gradient_that_is_no_slope_fails() -> None:
    """Of a reward that lets its gradient through where it rounds."""
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def straight_through(x: torch.Tensor) -> torch.Tensor:
        return (x + (x.round() - x).detach()).mean((1, 2, 3))

    found, differences = examine.gradient_and_differences(straight_through, x)
    assert (found - differences).abs().max() > examine.GRADIENT_ERROR * found.abs().max()
    smooth, differences = examine.gradient_and_differences(lambda x: x.square().sum((1, 2, 3)), x)
    assert torch.allclose(smooth, differences, rtol=1e-3)
    assert smooth.min() >= 2 * x.flatten().topk(8).values[-1]


def test_cost_is_that_of_the_recipes_size(tiny: list[str], scenes_field: str) -> None:
    """Not of the few rows of the other checks."""
    config = load(tiny, scenes_field, "env.num_groups=4", "env.group_size=5", "env.rows_per_call=10")
    found = by_name(doctor_module._real_size(config, trust_code=False))
    assert found["network evaluations"].value % 20 == 0
    assert "one iteration of 20 rows, 10 sampled and 96 scored at a time" in found["peak memory, MiB"].detail
    assert found["seconds per iteration"].detail.startswith("for 20 samples")


def test_a_batch_that_does_not_fit_fails(tiny: list[str], scenes_field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(tiny, scenes_field)

    def full(*args) -> Probe:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("rlflow.doctor.doctor.Probe", full)
    (check,) = doctor_module._real_size(config, trust_code=False)
    assert (check.verdict, check.detail) == ("FAIL", "CUDA out of memory.")
    monkeypatch.undo()
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    assert by_name(doctor_module._real_size(config, trust_code=False))["peak memory, MiB"].verdict == "FAIL"


class _Uncorrected(FlowSDE):
    """Noise without the score's correction: the law at t = 1 is too wide."""

    def step(self, x, v, t, t_next, hidden) -> Gaussian:
        step = super().step(x, v, t, t_next, hidden)
        return Gaussian(x + v * (t_next - t), step.std)


@pytest.mark.parametrize(("kernel", "verdict"), [(FlowSDE, "PASS"), (_Uncorrected, "FAIL"), (CPS, "INFO")])
def test_the_end_marginal_is_held_to_a_bound(
    tiny: list[str], scenes_field: str, monkeypatch: pytest.MonkeyPatch, kernel: type, verdict: str
) -> None:
    parts = make_parts(load(tiny, scenes_field, "policy.num_steps=8"))
    monkeypatch.setattr(parts.policy, "kernel", kernel())
    training, deployment = doctor_module._end_marginal(parts)
    assert (training.verdict, deployment.verdict) == (verdict, "PASS")


def test_the_answer_is_json_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("a", 0.5, "< 1", True, "why"), Check("b", math.nan, "0", False), Check("c", 3.0)]
    rows = json.loads(json.dumps(checks_as_json(checks), allow_nan=False))
    assert [row["verdict"] for row in rows] == ["PASS", "FAIL", "INFO"]
    assert [row["value"] for row in rows] == [0.5, None, 3.0]
    print_checks(checks)
    out = capsys.readouterr().out
    assert all(word in out for word in ("PASS", "FAIL", "INFO", "why"))


def test_few_rows_keep_the_settings(tiny: list[str], scenes_field: str) -> None:
    """Only sizes, budget and evaluation shrink; minibatches still divide the groups."""
    config = load(tiny, scenes_field, "env.num_groups=6", "env.group_size=16", "algorithm.num_minibatches=3")
    small = few_rows(config)
    assert (small.env.num_groups, small.env.group_size) == (3, 4)
    assert replace(small.algorithm, micro_batch=config.algorithm.micro_batch) == config.algorithm
    assert (small.steps, small.advantage, small.reward) == (config.steps, config.advantage, config.reward)
    assert replace(small.policy, max_kappa=config.policy.max_kappa) == config.policy


@pytest.mark.parametrize("steps", ["all_but_last", "{name: window, size: 2}", "one_random"])
def test_rows_are_sampled_and_scored_in_other_numbers(
    tiny: list[str], scenes_field: str, monkeypatch: pytest.MonkeyPatch, steps: str
) -> None:
    """Or a network whose rows depend on their neighbours would pass."""
    small = few_rows(load(tiny, scenes_field, f"steps={steps}", "env.group_size=16", "env.rows_per_call=96"))
    parts, sampled, scored = make_parts(small), [], []
    real = ChainLikelihood.score

    def watch(self, policy, cond, evidence) -> Score:
        if torch.is_grad_enabled():  # else the reference's
            scored.append(len(evidence.t))
        return real(self, policy, cond, evidence)

    send = parts.collector.env.send
    monkeypatch.setattr(
        parts.collector.env, "send", lambda action, rows: sampled.append(len(action)) or send(action, rows)
    )
    monkeypatch.setattr(ChainLikelihood, "score", watch)
    Probe(parts, 0)
    assert set(sampled) == {4}
    assert scored
    assert 4 not in scored
    assert max(scored) < 4


def test_log_ratios_stand_in_the_order_of_their_steps() -> None:
    """Step 10 after step 9."""
    metrics = {f"policy/first_log_ratio/{k}": float(k) for k in (10, 2, 1, 0)} | {"policy/first_log_ratio_max": 0.0}
    policy = SimpleNamespace(device=torch.device("cpu"), field=SimpleNamespace(ragged=False))
    check = examine._first_log_ratio(SimpleNamespace(metrics=metrics, parts=SimpleNamespace(policy=policy)))
    assert check.detail.endswith(": 0 1 2 10")


# -- what is broken fails -------------------------------------------------------------------------


class _Broken(ChainLikelihood):
    """Scores on times that are not those of the sampler (the mutation of DESIGN section 6)."""

    def score(self, policy, cond, evidence) -> Score:
        return super().score(policy, cond, replace(evidence, t=evidence.t * 0.99))


class _Detached(ChainLikelihood):
    """old = new.detach(): every ratio is 1 for ever."""

    def score(self, policy, cond, evidence) -> Score:
        score = super().score(policy, cond, evidence)
        return Score(score.log_prob - score.log_prob.detach() + evidence.old_log_prob, score.dist)


@pytest.mark.parametrize(("broken", "fails"), [(_Broken, "first log-ratio"), (_Detached, "log-ratio after one update")])
def test_a_wrong_ratio_fails(
    tiny: list[str], scenes_field: str, monkeypatch: pytest.MonkeyPatch, broken: type, fails: str
) -> None:
    monkeypatch.setattr("rlflow.rl.likelihoods.chain.ChainLikelihood", broken)
    monkeypatch.setattr(doctor_module, "_resume", lambda *a: Check("resume", 0))
    found = by_name(doctor(load(tiny, scenes_field, "algorithm.kl.beta=0")))
    assert found[fails].verdict == "FAIL"
    assert found["kappa"].verdict == "PASS"


def test_a_network_that_answers_otherwise_the_second_time_fails(tiny: list[str], scenes_field: str) -> None:
    probe = Probe(make_parts(few_rows(load(tiny, scenes_field))), 0)
    assert two_passes(probe) == 0
    field = probe.parts.policy.field.unguided
    field.register_forward_hook(lambda module, args, v: torch.nn.functional.dropout(v, 0.1))
    assert two_passes(probe) > 0.1


def test_a_bad_gradient_fails(tiny: list[str], scenes_field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FlowPolicy.velocity

    def poisoned(self, x, t, dt, cond):
        v = real(self, x, t, dt, cond)
        if v.requires_grad:
            v.register_hook(lambda grad: grad * torch.nan)
        return v

    monkeypatch.setattr(FlowPolicy, "velocity", poisoned)
    monkeypatch.setattr(doctor_module, "_resume", lambda *a: Check("resume", 0))
    found = by_name(doctor(load(tiny, scenes_field)))
    assert found["gradients not finite"].verdict == "FAIL"
    assert found["gradients not finite"].value > 10
    assert found["gradient norm"].verdict == "FAIL"


def test_a_resume_that_forgets_fails(tiny: list[str], scenes_field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser's moments are dropped on the way: said by name."""
    from rlflow.rl.optim import Optimizer

    real = Optimizer.load_state_dict
    monkeypatch.setattr(Optimizer, "load_state_dict", lambda self, state: real(self, state | {"moments": {}}))
    found = by_name(doctor(load(tiny, scenes_field)))
    assert found["resume"].verdict == "FAIL"
    assert "algorithm/optimizer" in found["resume"].detail


def test_kappa_and_masked_rewards_fail_instead_of_raising(
    tiny: list[str], scenes_field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that training refuses can still be looked at."""
    monkeypatch.setattr(doctor_module, "_resume", lambda *a: Check("resume", 0))
    monkeypatch.setattr("rlflow.rewards.colour.brightness", lambda images: None)
    found = by_name(doctor(load(tiny, scenes_field, "policy.kernel={name: cps, eta: 0.02}")))
    assert found["kappa"].verdict == "FAIL"
    assert found["kappa"].value > 5
    assert found["rewards masked"].value == 1
    assert found["rewards masked"].verdict == "FAIL"


OFF_POLICY = [*("env.num_groups=4", "env.group_size=1", "algorithm.batch_size=32", "eval.num=4", "eval.every=0")]
OFF_POLICY += ["train.tensorboard=false", "train.report=false", "algorithm.start=0", "algorithm.updates_per_step=0.25"]


def test_an_off_policy_recipe_passes() -> None:
    """It has no ratios; its entropy target, resume with the replay, and cost are looked at."""
    checks = by_name(doctor(recipes.load("robot_reach_sac", OFF_POLICY)))
    assert {name for name, check in checks.items() if check.passed is False} == set()
    for name in ("entropy target", "critic loss", "gradient norm", "resume", "network evaluations"):
        assert checks[name].verdict == "PASS", name
    assert "first log-ratio" not in checks


@pytest.mark.parametrize("overrides", [[], ["algorithm.actor_every=3"], ["algorithm.start=20"]])
def test_the_closed_form_of_an_off_policy_learner(overrides: list[str]) -> None:
    """Target and actor, the actor's backward counted twice, at the steps where there is one."""
    parts = make_parts(recipes.load("robot_reach_sac", [*OFF_POLICY, *overrides]))
    for iteration in range(3):
        before, cost = parts.policy.network_cost, iteration_cost(parts, iteration)
        parts.algorithm.update(parts.collector.collect(iteration))
        assert parts.policy.network_cost - before == cost.total


# -- cost in closed form --------------------------------------------------------------------------

COSTS = {
    "all but last": [],
    "KL, epochs, minibatches": ["algorithm.kl.beta=0.1", "algorithm.epochs=2", "algorithm.num_minibatches=2"],
    "window, Heun": ["steps={name: window, size: 2, every: 1}", "policy.solver=heun"],
    "window, FireFlow, Flash": ["steps={name: window, size: 2, compress: 0.7}", "policy.solver=fireflow"],
    "shared noise": ["steps={name: last_n, n: 2, skip_last: 1}", "env.shared_noise=true", "policy.solver=dpm2m"],
    "guided": ["policy.guidance={name: cfg, scale: 2.0}"],
    "one step each": ["steps=one_random"],
    "fraction": ["steps={name: fraction, fraction: 0.6}", "env.shared_noise=true"],
    "joint in pieces": ["likelihood.joint=true", "algorithm.micro_batch=3"],
    "joint": ["likelihood.joint=true", "algorithm.micro_batch=64"],
    "cfm": ["likelihood={name: cfm, draws: 3}", "steps=none", "algorithm.kl.kind=exact"],
    "cfm in pieces": ["likelihood={name: cfm, draws: 3}", "algorithm.micro_batch=2", "algorithm.kl.beta=0"],
    "cfm of a guided policy": [
        "likelihood={name: cfm, draws: 3, allow_guided: true}",
        "policy.guidance={name: cfg, scale: 2.0}",
        "algorithm.kl.kind=exact",
    ],
    "critic": ["advantage=gae"],
}


@pytest.mark.parametrize("name", COSTS)
def test_the_closed_form_counts_every_network_row(tiny: list[str], scenes_field: str, name: str) -> None:
    """Equal to the counter of the policy, which counts where the network is called, for several iterations."""
    parts = make_parts(few_rows(load(tiny, scenes_field, "algorithm.kl.beta=0", *COSTS[name])))
    for iteration in range(3):
        before = parts.policy.network_cost
        rollout = parts.collector.collect(iteration)
        assert parts.policy.network_cost - before == iteration_cost(parts, iteration).rollout
        parts.algorithm.update(rollout)
        assert parts.policy.network_cost - before == iteration_cost(parts, iteration).total


@pytest.mark.parametrize(
    ("solver", "calls"), [(Euler(), 6), (Heun(), 9), (Midpoint(), 9), (FireFlow(), 8), (DPMSolver2M(), 6)]
)
def test_solver_calls_by_hand(solver: Solver, calls: int) -> None:
    """Steps o n n o o n: runs of 1 and 2 ODE steps, three noisy ones."""
    noisy = torch.tensor([False, True, True, False, False, True])
    assert solver_calls(Plan(torch.linspace(0, 1, 7), noisy, noisy), solver) == calls


# -- the law at t = 1 -----------------------------------------------------------------------------


def monte_carlo(kernel: Kernel, solver: Solver, plan: Plan, num: int) -> tuple[float, float]:
    """Mean and std at the end by sampling the same chain with the policy's own loop."""
    from rlflow.flow.field import VelocityField
    from rlflow.flow.marginal import exact_velocity
    from rlflow.types import Cond

    class Exact(VelocityField):
        event_shape, num_features = (1,), 1

        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x, t, dt, cond):
            return exact_velocity(x, t, dt, cond)

    policy = FlowPolicy(Exact(), kernel, solver)
    with torch.no_grad():
        final = policy.sample(Cond({"pooled": torch.zeros(num, 1, dtype=torch.float64)}), plan).final
    return float(final.mean()), float(final.std())


@pytest.mark.parametrize("kernel", [FlowSDE(), ConstantSDE(), CPS(), Ancestral()], ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("solver", [Euler(), Heun(), DPMSolver2M()], ids=lambda s: type(s).__name__)
def test_exact_moments_are_those_of_the_sampler(kernel: Kernel, solver: Solver) -> None:
    """Against 40,000 samples of the policy's own loop, window in the middle, ODE steps around it."""
    grid = Shifted(2.0)(7)
    plan = Window(size=3, every=1)(1, grid, torch.zeros(1, dtype=torch.long))
    kernel = copy.deepcopy(kernel).double()
    mean, std = end_moments(kernel, solver, plan, (1,), 1)
    sampled_mean, sampled_std = monte_carlo(kernel, solver, plan, 40_000)
    assert mean == pytest.approx(sampled_mean, abs=0.012)
    assert std == pytest.approx(sampled_std, abs=0.012)


def test_end_errors_of_the_methods_page() -> None:
    """The ODE and the marginal family converge; CPS does not (std .426 for .5 at eta .7)."""

    def error(kernel: Kernel, num_steps: int) -> float:
        grid = Uniform()(num_steps)
        return end_error(kernel.double(), Euler(), AllButLast()(0, grid, torch.zeros(1, dtype=torch.long)))

    ode = [end_error(FlowSDE().double(), Euler(), deterministic(Uniform()(n))) for n in (10, 160)]
    assert ode[1] < ode[0] / 10
    assert error(FlowSDE(), 10) < ode[0]
    assert error(Ancestral(), 160) < error(Ancestral(), 10) / 8
    assert error(CPS(), 640) == pytest.approx(STD - 0.426, abs=0.004)


def test_end_moments_of_plans_that_differ_by_row() -> None:
    """One_random and fraction: the first row's plan; a learned noise of several dims: their mean variance."""
    grid = Uniform()(6)
    rows = torch.arange(3)
    for steps in (OneRandom(), Fraction()):
        mean, _ = end_moments(FlowSDE().double(), Euler(), steps(0, grid, rows), (2, 2), 3)
        assert abs(mean - MEAN) < 0.5
    kernel = LearnedNoise(3, (2, 2)).double()
    with torch.no_grad():
        _, std = end_moments(kernel, Euler(), AllButLast()(0, grid, rows), (2, 2), 3)
        _, ode = end_moments(kernel, Euler(), deterministic(grid), (2, 2), 3)
    assert std > ode, "learned noise widens the law: it is exploration"
