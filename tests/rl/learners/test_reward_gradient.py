"""Reward gradients: those of finite differences through the whole sampler, in the memory of one step."""

import pytest
import torch
from torch import Tensor

from rlflow.flow.guidance import CFG
from rlflow.flow.kernels import Ancestral
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import DPMSolver2M, Euler, Heun, Solver
from rlflow.flow.steps import AllButLast, NoSteps, Steps, deterministic
from rlflow.models.mlp import MLPField
from rlflow.rl.groups import Groups
from rlflow.rl.learners.reward_gradient import LastN, ReFL, RewardGradient, Through
from rlflow.rl.optim import AdamW
from rlflow.types import Rollout

K, SHAPE = 4, (3,)
ASKED = torch.randn(8, 3, generator=torch.Generator().manual_seed(7))


def reward(x: Tensor, rows: Tensor) -> Tensor:
    """Curved, and each row's own."""
    return -(x - ASKED[rows].to(x)).square().sum(1) + x.sin().prod(1)


def make_policy(dtype: torch.dtype = torch.float64, solver: Solver | None = None, guided: bool = False) -> FlowPolicy:
    torch.manual_seed(0)
    field = MLPField(3, SHAPE, width=12)
    return FlowPolicy(CFG(field, 2.0) if guided else field, Ancestral(1.0), solver, num_steps=K).to(dtype)


def collect(policy: FlowPolicy, steps: Steps, groups: Groups, keep: int, iteration: int = 0) -> Rollout:
    """What the collector makes of one step of a world whose observations are the rows of ASKED."""
    obs = ASKED[torch.arange(groups.num_rows) % len(ASKED)].to(policy.dtype)
    plan = steps(iteration, policy.grid(policy.num_steps), groups.row_ids())
    with torch.no_grad():
        cond = policy.encode(obs)
        chain = policy.sample(cond, plan, key=Key(0, "rollout", iteration), row_ids=groups.row_ids(), keep_path=True)
    assert chain.path is not None
    one = torch.ones(1, groups.num_rows, dtype=policy.dtype)
    return Rollout(
        obs=obs[None],
        action=chain.final[None],
        reward=one,
        terminated=one > 0,
        truncated=one < 0,
        weight=one.clone(),
        last_obs=obs,
        final_obs=None,
        group=groups.group_ids(),
        row_ids=groups.row_ids()[None],
        path=chain.path[:, -keep - 1 :],
        cond=cond,
    )


def learner(policy: FlowPolicy, through: Through, steps: Steps | None = None, **more: object) -> RewardGradient:
    more = {"optimizer": AdamW(lr=1e-2), "groups": Groups(8, 1), "reward": reward, "micro_batch": 3} | more
    groups, judge = more.pop("groups"), more.pop("reward")
    return RewardGradient(policy, steps or NoSteps(), groups, judge, through, **more)


def gradient_of(algorithm: RewardGradient, rollout: Rollout | None = None) -> tuple[list[Tensor], dict[str, float]]:
    """What `update` would step by; the weights stay."""
    policy, seen = algorithm.policy, []
    rollout = rollout or collect(policy, algorithm.steps, algorithm.groups, algorithm.keep_path)

    def step() -> float:
        seen.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in algorithm.optimizer.parameters)
        return 0.0

    algorithm.optimizer.step = step
    metrics = algorithm.update(rollout)
    return seen, metrics


def plain(policy: FlowPolicy, n: int) -> list[Tensor]:
    """The same gradient with the graph of all n last steps kept at once; what came before is held."""
    groups = Groups(8, 1)
    rollout = collect(policy, NoSteps(), groups, n)
    plan = deterministic(policy.grid(K)[-n - 1 :])
    final = policy.sample(policy.encode(rollout.obs[0]), plan, x_0=rollout.path[:, 0]).final
    loss = -reward(policy.squash(final), torch.arange(8)).mean()
    return list(torch.autograd.grad(loss, list(policy.parameters())))


def loss_of(policy: FlowPolicy, n: int, start: Tensor) -> Tensor:
    with torch.no_grad():
        plan = deterministic(policy.grid(K)[-n - 1 :])
        final = policy.sample(policy.encode(ASKED.to(policy.dtype)), plan, x_0=start).final
        return -reward(policy.squash(final), torch.arange(8)).mean()


@pytest.mark.parametrize("n", [1, 3, K])
@pytest.mark.parametrize(("solver", "guided"), [(Euler(), False), (Heun(), False), (Euler(), True)])
def test_gradients_are_those_of_finite_differences(n: int, solver: Solver, guided: bool) -> None:
    """With the first K - n velocities held constant, that is from the state that they lead to."""
    policy = make_policy(solver=solver, guided=guided)
    start = collect(policy, NoSteps(), Groups(8, 1), n).path[:, 0]
    found, metrics = gradient_of(learner(policy, LastN(n)))
    assert metrics["policy/loss"] == pytest.approx(float(loss_of(policy, n, start)))
    for seed in range(3):
        rng, size = torch.Generator().manual_seed(seed), 1e-6
        way = [torch.randn(p.shape, generator=rng, dtype=p.dtype) for p in policy.parameters()]
        ends = []
        for sign in (1, -2, 1):  # up, down, back
            for p, d in zip(policy.parameters(), way, strict=True):
                p.data += sign * size * d
            ends.append(loss_of(policy, n, start))
        slope = sum(float((g * d).sum()) for g, d in zip(found, way, strict=True))
        assert slope == pytest.approx(float(ends[0] - ends[1]) / (2 * size), rel=1e-6)


@pytest.mark.parametrize("n", [1, K])
def test_a_step_at_a_time_is_the_whole_graph_bit_for_bit(n: int) -> None:
    policy = make_policy(torch.float32)
    found, _ = gradient_of(learner(policy, LastN(n), micro_batch=8))
    assert all(torch.equal(a, b) for a, b in zip(found, plain(policy, n), strict=True))


def test_parts_of_a_batch_add_up_and_no_two_steps_are_in_memory() -> None:
    policy = make_policy()
    whole, _ = gradient_of(learner(policy, LastN(K), micro_batch=8))
    parts, _ = gradient_of(learner(policy, LastN(K), micro_batch=3))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_last_prediction_is_the_last_step() -> None:
    """On Euler's way into the data, ReFL of the last step is DRaFT-1; of more, it draws among them."""
    policy = make_policy()
    one, _ = gradient_of(learner(policy, ReFL(1)))
    for a, b in zip(one, gradient_of(learner(policy, LastN(1)))[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    drawn, _ = gradient_of(learner(policy, ReFL(3)))
    assert not all(torch.allclose(a, b) for a, b in zip(drawn, one, strict=True))


def test_masked_and_broken_samples_pull_nothing() -> None:
    """A row of weight 0, one whose states are not finite, one that the reward has no score for: the mean of the others."""
    policy, groups = make_policy(), Groups(8, 1)
    blind = lambda x, rows: reward(x, rows) * torch.where(rows == 5, torch.nan, 1.0)  # noqa: E731
    algorithm = learner(policy, LastN(2), reward=blind)
    rollout = collect(policy, NoSteps(), groups, 2)
    rollout.weight[0, 1] = 0
    rollout.path[3, 0] = torch.nan
    found, metrics = gradient_of(algorithm, rollout)
    only = collect(policy, NoSteps(), groups, 2)
    only.weight[0, [1, 3, 5]] = 0
    wanted, _ = gradient_of(learner(policy, LastN(2)), only)
    for a, b in zip(found, wanted, strict=True):  # a row without a score still counts in the mean
        torch.testing.assert_close(a * 6 / 5, b, rtol=1e-10, atol=1e-14)
    assert metrics["rollout/masked_frac"] == pytest.approx(2 / 8)


def test_the_control_judges_by_the_next_groups_prompt() -> None:
    policy, groups = make_policy(), Groups(4, 2)
    seen: list[int] = []

    def judge(x: Tensor, rows: Tensor) -> Tensor:
        seen.extend(rows.tolist())
        return x.sum(1)

    gradient_of(learner(policy, LastN(1), groups=groups, reward=judge, permute=True))
    assert seen == [2, 3, 4, 5, 6, 7, 0, 1]
    with pytest.raises(ValueError, match="a process needs 2 groups"):
        learner(policy, LastN(1), groups=Groups(1, 8), permute=True)


def test_kl_is_of_velocities_and_holds_at_the_reference_only() -> None:
    policy = make_policy()
    algorithm = learner(policy, LastN(1), kl=0.5, reward=lambda x, rows: 0 * x.sum(1))
    assert algorithm.keep_path == K, "any step may be drawn"
    at_start, metrics = gradient_of(algorithm)
    assert metrics["kl/ref"] == 0
    assert all((g == 0).all() for g in at_start)
    for p in policy.parameters():
        p.data += 0.1
    moved, metrics = gradient_of(algorithm)
    assert metrics["kl/ref"] > 0
    assert any((g != 0).any() for g in moved)


@pytest.mark.parametrize(
    ("through", "more", "reason"),
    [
        (LastN(1), {"steps": AllButLast()}, "last_n differentiates the deployment sampler.*: use steps=none"),
        (LastN(9), {}, "last_n of n=9 steps, and policy.num_steps=4: lower n"),
        (ReFL(1), {"steps": AllButLast()}, "refl differentiates the deployment sampler.*: use steps=none"),
        (LastN(1), {"solver": DPMSolver2M()}, "DPMSolver2M reads the step before.*use policy.solver=euler"),
    ],
)
def test_what_has_no_gradient_is_refused(through: Through, more: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        learner(make_policy(solver=more.get("solver")), through, more.get("steps"))


def test_an_update_climbs() -> None:
    policy, groups = make_policy(), Groups(8, 1)
    algorithm = learner(policy, LastN(K))
    losses = [
        algorithm.update(collect(policy, NoSteps(), groups, K, iteration))["policy/loss"] for iteration in range(30)
    ]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert policy.weights.sets["ema"].keys() == policy.weights.parameters().keys()
