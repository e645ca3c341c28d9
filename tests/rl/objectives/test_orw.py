"""ORW and AC-Flow: weights meet their own samples, the optimum is the tilted velocity drawn to the reference's."""

from functools import partial

import pytest
import torch
from torch import Tensor

from rlflow.flow.gaussian import Gaussian
from rlflow.flow.steps import NoSteps
from rlflow.rl.advantages import Advantages
from rlflow.rl.batch import Batch
from rlflow.rl.learners.regularizers import KL, reference_kl
from rlflow.rl.likelihoods.base import Score
from rlflow.rl.likelihoods.cfm import CFMLikelihood
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.objectives.orw import ORW, ACFlow
from rlflow.rl.path_critic import PathCritic
from rlflow.types import Cond, Evidence
from tests.rl.objectives.test_nft import evidence_of

DRAWS = CFMLikelihood(3, joint=False)


def batch_of(parts, rollout) -> Batch:
    return parts.algorithm._prepare(rollout)


def prepared(objective: ORW, advantage: Tensor, weight: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
    """Weights (N, 1) that an objective makes of advantages (N, 1)."""

    class Bare:
        row_weight = torch.ones(len(advantage), dtype=torch.float64) if weight is None else weight
        num_columns = 1

    bare = Bare()
    bare.advantage, bare.metrics = advantage, {}
    objective.prepare(bare)
    return bare.advantage, bare.metrics


def test_weights_are_exponentials_of_mean_1_and_masked_rows_do_not_count() -> None:
    a = torch.tensor([[0.0], [1.0], [-2.0], [50.0]], dtype=torch.float64)
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    found, metrics = prepared(ORW(DRAWS, beta=0.7, clip=5.0), a, weight)
    raw = (0.7 * a[:3]).exp()
    torch.testing.assert_close(found[:3], raw / raw.mean())
    assert metrics["policy/effective_frac"] == pytest.approx(float(raw.mean() ** 2 / raw.square().mean()))


def test_without_an_advantage_it_is_plain_matching(make, gradient) -> None:
    """The gradient is that of the mean matching loss, of every row."""
    parts = make(steps=NoSteps(), likelihood=DRAWS, objective=ORW, micro_batch=5)
    rollout = parts.collect()
    parts.algorithm.advantage = lambda r, v, n: Advantages(0 * r.reward, r.weight)
    found, _ = gradient(parts, rollout)
    score = DRAWS.score(parts.policy, parts.policy.encode(rollout.flat(rollout.obs)), rollout.evidence)
    wanted = torch.autograd.grad(-score.log_prob.mean(), list(parts.policy.field.parameters()))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in wanted]))


def test_a_weight_meets_its_own_sample() -> None:
    """Rows in another order have their losses in that order; weights alone in another order do not."""
    e, v = evidence_of(), torch.randn(5, 3, 2, 4, dtype=torch.float64)
    w, order = torch.rand(5, 1, dtype=torch.float64), torch.tensor([3, 0, 4, 1, 2])

    def losses(rows: Tensor, weights: Tensor) -> Tensor:
        part = e.index(rows)
        return (
            ORW(DRAWS)
            .loss(Score(DRAWS._minus_loss(v[rows], part), Gaussian(v[rows], part.old_std)), part, weights)
            .pairs
        )

    torch.testing.assert_close(losses(order, w[order]), losses(torch.arange(5), w)[order], rtol=0, atol=0)
    assert not torch.allclose(losses(order, w), losses(torch.arange(5), w)[order])


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0])
def test_the_best_velocity_is_the_tilted_one_drawn_to_the_reference(alpha: float, control_variate: bool) -> None:
    """v* = (E[w u] + alpha v_ref) / (E[w] + alpha) for one x_t that many samples share; also where E[w] is not 1."""
    num, v_ref = 4000, 0.7
    u = torch.randn(num, 1, 1, dtype=torch.float64)
    t, zero = torch.full((num, 1), 0.3, dtype=torch.float64), torch.zeros(num, 1, 1, dtype=torch.float64)
    std, valid = torch.full_like(zero, 0.5**0.5), t.bool()
    e = Evidence(zero, u, t, t, t, u.mean().expand_as(zero), std, valid, torch.full_like(zero, v_ref), std)
    w = (0.8 * u[:, 0]).exp() * 1.7
    best = float(((w * u[:, 0]).mean() + alpha * v_ref) / (w.mean() + alpha))
    v = torch.tensor(best, dtype=torch.float64, requires_grad=True)
    dist = Gaussian(v.expand(num, 1, 1), std)
    objective = ORW(DRAWS, control_variate=control_variate)
    loss = objective.loss(Score(DRAWS._minus_loss(dist.mean, e), dist), e, w).pairs
    anchored = loss + alpha * reference_kl("exact", dist, e, "mean", None)
    (slope,) = torch.autograd.grad(anchored.mean(), v)
    assert abs(float(slope)) < 1e-12


def test_with_the_control_variate_equal_rewards_move_nothing(make, gradient) -> None:
    parts = make(steps=NoSteps(), likelihood=DRAWS, objective=partial(ORW, control_variate=True), micro_batch=5)
    parts.algorithm.advantage = lambda r, v, n: Advantages(0 * r.reward, r.weight)
    assert gradient(parts, parts.collect())[0].abs().max() == 0
    with pytest.raises(ValueError, match="likelihood.supervise=velocity"):
        ORW(CFMLikelihood(3, joint=False, supervise="sample"), control_variate=True)


class TestCritic:
    def of(self, make, **settings):
        return make(steps=NoSteps(), likelihood=DRAWS, objective=partial(ACFlow, **settings), micro_batch=5)

    def test_is_0_at_first_so_the_first_iteration_is_that_of_orw(self, make, gradient) -> None:
        """Bit for bit."""
        ours, plain = self.of(make), make(steps=NoSteps(), likelihood=DRAWS, objective=ORW, micro_batch=5)
        assert torch.equal(gradient(ours, ours.collect())[0], gradient(plain, plain.collect())[0])

    def test_while_it_warms_up_the_policy_keeps_every_bit(self, make) -> None:
        parts = make(
            steps=NoSteps(), likelihood=DRAWS, objective=ACFlow, critic_warmup=2, num_minibatches=2, kl=KL(0.1)
        )
        before = [p.detach().clone() for p in parts.algorithm.optimizer.parameters]
        critic = parts.algorithm.objective.critic.net
        untrained = [p.detach().clone() for p in critic.parameters()]
        for i in range(3):
            metrics = parts.iterate(i)
            same = all(map(torch.equal, before, parts.algorithm.optimizer.parameters))
            assert same == (i < 2)
            assert ("optim/grad_norm" in metrics) == (i == 2)
        assert not all(map(torch.equal, untrained, critic.parameters()))

    @pytest.mark.parametrize("value", ["soft", "mean"])
    def test_learns_the_soft_or_the_mean_value_of_what_it_sees(self, make, value: str) -> None:
        """Every draw alike: V is one number, log E[exp(2 A)] / 2 or E[A]; the soft one makes the mean weight 1."""
        parts = self.of(make, beta=2.0, clip=10.0, value=value, critic_lr=1e-2)
        batch, objective = batch_of(parts, parts.collect()), parts.algorithm.objective
        for name in ("x", "x_next", "t"):
            getattr(batch.evidence, name).fill_(0.25)
        batch.cond = lambda rows: parts.policy.encode(torch.zeros(len(rows), 4, dtype=torch.float64))
        rows = torch.arange(len(batch.row_alive))
        objective.target = torch.tensor([-0.5, 0.5], dtype=torch.float64).repeat(len(rows) // 2).unsqueeze(1)
        for _ in range(250):
            objective.learn(batch, rows)
        v = objective.critic.values(batch)
        wanted = {"soft": torch.tensor([-1.0, 1.0]).exp().mean().log() / 2, "mean": torch.tensor(0.0)}[value]
        torch.testing.assert_close(v, wanted.double().expand_as(v), atol=0.01, rtol=0)
        mean_weight = (2.0 * (objective.target - v)).exp().mean()
        assert (abs(float(mean_weight) - 1) < 0.02) == (value == "soft")

    def test_sees_the_sample_half_finished_its_time_and_the_condition(self) -> None:
        for shape in ((3,), (4, 3), (3, 16, 16)):
            torch.manual_seed(0)
            net = PathCritic(shape, 5).double()
            torch.nn.init.normal_(net.net[-1].weight)
            x, t, pooled = torch.randn(2, *shape).double(), torch.rand(2).double(), torch.randn(2, 5).double()
            base = net(x, t, Cond({"pooled": pooled}))
            for moved in ((x + 0.5, t, pooled), (x, t * 0.5, pooled), (x, t, pooled + 1)):
                assert not torch.allclose(base, net(moved[0], moved[1], Cond({"pooled": moved[2]})))

    def test_comes_back_with_a_checkpoint(self, make) -> None:
        one, two = self.of(make), self.of(make)
        one.iterate(0)
        two.algorithm.load_state_dict(one.algorithm.state_dict())
        pairs = zip(
            one.algorithm.objective.critic.net.parameters(),
            two.algorithm.objective.critic.net.parameters(),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)


def test_other_evidence_is_refused() -> None:
    for objective in (ORW, ACFlow):
        for likelihood in (CFMLikelihood(3, joint=True), ChainLikelihood("mean")):
            with pytest.raises(ValueError, match=r"set likelihood=\{name: cfm, joint: false\}"):
                objective(likelihood)


def test_a_warm_up_without_a_critic_is_refused(make) -> None:
    with pytest.raises(ValueError, match="no critic to warm up"):
        make(steps=NoSteps(), likelihood=DRAWS, objective=ORW, critic_warmup=1)


def test_states_lie_on_the_path_of_each_draw() -> None:
    e = evidence_of()
    x_t = DRAWS.states(e)
    torch.testing.assert_close(x_t[2, 1], (1 - e.t[2, 1]) * e.x[2, 1] + e.t[2, 1] * e.x_next[2, 1])
