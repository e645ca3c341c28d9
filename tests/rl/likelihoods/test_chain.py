"""Chain likelihood: a stored pair scores as it was sampled, in one network pass, and the reference runs once."""

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from rlflow.flow.field import FEW_ROWS
from rlflow.flow.gaussian import Gaussian
from rlflow.flow.guidance import CFG
from rlflow.flow.kernels import FlowSDE, LearnedNoise
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import Heun
from rlflow.flow.steps import All, AllButLast, Fraction, LastN, NoSteps, OneRandom, RandomWindow, Steps, Window
from rlflow.models.cnn import PixelField
from rlflow.models.mlp import MLPField
from rlflow.rl.advantages import GAE
from rlflow.rl.learners.policy_gradient import KL
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.types import Cond, Evidence

KERNELS = ["flow", "constant", "cps", "ancestral", "learned"]
PLANS = [
    AllButLast(),
    LastN(2, skip_last=1),
    Window(size=2, every=1),
    Window(size=2, every=1, compress=0.5),
    RandomWindow(2),
    OneRandom(),
    Fraction(0.6),
]
LIKELIHOODS = [ChainLikelihood("mean"), ChainLikelihood("sum"), ChainLikelihood("sum", joint=True)]
N = 6


def recorded(policy: FlowPolicy, steps: Steps, likelihood: ChainLikelihood) -> tuple[Evidence, Cond]:
    cond = policy.encode(torch.linspace(-1, 1, 4 * N).reshape(N, 4))
    plan = steps(1, policy.grid(policy.num_steps), torch.arange(N))
    with torch.no_grad():
        chain = policy.sample(cond, plan, key=Key(0, "sample", 1))
    return likelihood.record(policy, cond, chain, Key(0, "sample", 1), torch.arange(N)), cond


def moved(policy: FlowPolicy) -> FlowPolicy:
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.02 * torch.randn_like(p)
    return policy


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("steps", PLANS, ids=repr)
class TestRatio:
    @pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
    def test_is_1_at_unchanged_weights_and_not_after_a_change(self, make, kernel, steps, likelihood):
        policy = make(kernel=kernel).policy
        evidence, cond = recorded(policy, steps, likelihood)
        before = likelihood.log_ratio(likelihood.score(policy, cond, evidence).log_prob, evidence)
        assert before.shape == ((N, 1) if likelihood.joint else evidence.t.shape)
        assert float(before.detach().abs().max()) <= 1e-12  # one batch of N * R rows against R batches of N
        after = likelihood.log_ratio(likelihood.score(moved(policy), cond, evidence).log_prob, evidence)
        assert float(after.detach().abs().max()) > 1e-3

    def test_of_the_joint_is_the_sum_of_the_columns_and_a_mean_is_a_sum_over_dims(self, make, kernel, steps):
        policy = make(kernel=kernel).policy
        evidence, cond = recorded(policy, steps, ChainLikelihood("sum"))
        moved(policy)
        score = ChainLikelihood("sum").score(policy, cond, evidence)
        columns = ChainLikelihood("sum").log_ratio(score.log_prob, evidence)
        joint = ChainLikelihood("sum", joint=True).log_ratio(score.log_prob, evidence)
        assert torch.equal(joint[:, 0], columns.sum(1))
        mean = ChainLikelihood("mean").score(policy, cond, evidence).log_prob
        torch.testing.assert_close(mean * math.prod(policy.event_shape), score.log_prob)

    def test_is_the_density_of_the_stored_next_state(self, make, kernel, steps):
        policy = make(kernel=kernel).policy
        evidence, cond = recorded(policy, steps, ChainLikelihood("sum"))
        for row, column in [(0, 0), (N - 1, -1)]:
            x, x_next, t, t_next = (
                z[row : row + 1, column] for z in (evidence.x, evidence.x_next, evidence.t, evidence.t_next)
            )
            dist = policy.transition(x, t, t_next, cond.index(torch.tensor([row])))
            by_torch = torch.distributions.Normal(dist.mean, dist.std.expand_as(dist.mean)).log_prob(x_next).sum()
            torch.testing.assert_close(evidence.old_log_prob[row, column], by_torch)


class TestScore:
    def test_is_one_network_pass_over_all_pairs(self, make):
        policy = make().policy
        evidence, cond = recorded(policy, AllButLast(), ChainLikelihood())
        calls = []
        policy.field.register_forward_hook(lambda module, args, out: calls.append(len(out)))
        rows = policy.network_rows
        ChainLikelihood().score(policy, cond, evidence)
        assert calls == [-(-N * 4 // FEW_ROWS) * FEW_ROWS], "filled up on the CPU"
        assert policy.network_rows - rows == N * 4

    def test_recording_costs_no_network_pass(self, make):
        policy = make().policy
        cond = policy.encode(torch.zeros(N, 4))
        chain = policy.sample(cond, AllButLast()(0, policy.grid(5), torch.arange(N)))
        rows = policy.network_rows
        ChainLikelihood().record(policy, cond, chain, Key(0, "test"), torch.arange(N))
        assert policy.network_rows == rows

    def test_every_row_meets_its_own_condition(self, make):
        policy = make().policy
        evidence, cond = recorded(policy, AllButLast(), ChainLikelihood())
        whole = ChainLikelihood().score(policy, cond, evidence).log_prob
        for row in range(N):
            one = torch.tensor([row])
            alone = ChainLikelihood().score(policy, cond.index(one), evidence.index(one)).log_prob
            torch.testing.assert_close(alone, whole[one])

    def test_an_invalid_column_counts_as_ratio_1(self, make):
        policy = make().policy
        evidence, cond = recorded(policy, AllButLast(), ChainLikelihood())
        evidence.valid[:, 1] = False
        score = ChainLikelihood().score(moved(policy), cond, evidence).log_prob
        score = torch.where(evidence.valid, score, torch.nan)
        columns = ChainLikelihood().log_ratio(score, evidence)
        assert not columns[:, 1].any()
        torch.testing.assert_close(ChainLikelihood(joint=True).log_ratio(score, evidence)[:, 0], columns.sum(1))

    def test_a_plan_without_scored_steps_is_refused(self, make):
        policy = make().policy
        cond = policy.encode(torch.zeros(N, 4))
        chain = policy.sample(cond, NoSteps()(0, policy.grid(5), torch.arange(N)))
        with pytest.raises(ValueError, match=r"needs scored steps.*all_but_last"):
            ChainLikelihood().record(policy, cond, chain, Key(0, "test"), torch.arange(N))


class TestReference:
    @pytest.mark.parametrize("kernel", ["flow", "learned"])
    @pytest.mark.parametrize("micro_batch", [1, 7, 1000])
    def test_is_the_transition_of_the_ref_weights_and_leaves_the_live_ones(self, make, kernel, micro_batch):
        policy = make(kernel=kernel).policy
        policy.weights.snapshot("ref")
        evidence, cond = recorded(policy, AllButLast(), ChainLikelihood())
        own = Gaussian(evidence.old_mean, evidence.old_std)
        live = [p.detach().clone() for p in moved(policy).parameters()]
        filled = ChainLikelihood().with_reference(policy, cond.index, evidence, micro_batch)
        torch.testing.assert_close(filled.ref_mean, own.mean)
        torch.testing.assert_close(filled.ref_std, own.std.expand_as(filled.ref_std))
        assert policy.weights.active == "live"
        assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), live, strict=True))
        assert not filled.ref_mean.requires_grad

    @pytest.mark.parametrize("micro_batch", [1, 3, 8, 1000])
    def test_no_pass_has_more_rows_than_micro_batch_and_every_pair_is_looked_at_once(self, make, micro_batch):
        """Rows that the network saw, of N samples with 4 columns: on a GPU, where nothing is filled up."""
        policy = make().policy
        policy.weights.snapshot("ref")
        policy.multiple = 1
        evidence, cond = recorded(policy, AllButLast(), ChainLikelihood())
        seen: list[int] = []
        policy.field.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        ChainLikelihood().with_reference(policy, cond.index, evidence, micro_batch)
        assert max(seen) <= micro_batch
        assert sum(seen) == N * 4
        assert len(seen) == -(-N * 4 // micro_batch)

    def test_encodes_under_the_ref_weights(self, make):
        policy = make().policy
        policy.weights.snapshot("ref")
        evidence, cond = recorded(policy, AllButLast(), ChainLikelihood())
        seen = []

        def cond_of(rows: Tensor) -> Cond:
            seen.append(policy.weights.active)
            return cond.index(rows)

        ChainLikelihood().with_reference(policy, cond_of, evidence, 8)
        assert set(seen) == {"ref"}


class TestCost:
    """Network rows of a whole iteration in closed form; a backward pass counts as two forwards."""

    ROWS: ClassVar = {"image": 16, "reach": 16 * 4}

    @pytest.mark.parametrize("env", ["image", "reach"])
    @pytest.mark.parametrize(
        ("steps", "walked", "scored"),
        [(AllButLast(), 5, 4), (Window(size=2), 5, 2), (OneRandom(), 5, 1), (Window(size=2, compress=0.5), 3, 2)],
        ids=["all_but_last", "window", "one_random", "flash"],
    )
    @pytest.mark.parametrize(("beta", "guard"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1.0), (0.1, 1.0)])
    def test_is_the_rollout_the_reference_once_and_three_per_scored_pair_and_epoch(
        self, make, env, steps, walked, scored, beta, guard
    ):
        """One look of the reference serves the KL and the guard of the velocity's norm."""
        parts = make(env, steps=steps, kl=KL(beta), norm_guard=guard, epochs=3, num_minibatches=2, micro_batch=13)
        n = self.ROWS[env]
        parts.iterate(0)
        reference = n * scored if beta or guard else 0
        assert parts.policy.network_cost == n * walked + reference + 3 * (3 * n * scored)
        assert parts.policy.network_rows == n * walked + reference + 3 * n * scored

    def test_a_critic_costs_no_network_rows(self, make):
        parts = make(advantage=GAE(), epochs=2, critic_steps=5)
        parts.iterate(0)
        assert parts.policy.network_cost == 16 * 5 + 2 * 3 * 16 * 4

    def test_a_joint_ratio_that_does_not_fit_is_scored_once_more(self, make):
        parts = make(likelihood=ChainLikelihood("sum", joint=True), micro_batch=3)
        parts.iterate(0)
        assert parts.policy.network_cost == 16 * 5 + (1 + 3) * 16 * 4

    def test_second_order_solvers_and_guidance_are_counted(self, make):
        parts = make(field=CFG(MLPField(4, (2,), width=8), 2.0), solver=Heun(), steps=Window(size=2))
        parts.iterate(0)
        assert parts.policy.network_cost == 2 * (16 * (2 + 2 * 3) + 3 * 16 * 2)

    def test_a_shared_start_runs_the_steps_before_the_window_once_per_group(self, make):
        parts = make(steps=Window(size=2, every=1), collector={"shared_noise": True})
        rollout = parts.collector.collect(1)
        assert rollout.network_calls == 4 * 1 + 16 * 4

    def test_all_steps_scored_or_none_are_told_apart(self, make):
        assert make(steps=All()).collect().evidence.t.shape == (16, 5)
        with pytest.raises(ValueError, match="NoSteps scores no step: use steps=all_but_last"):
            make(steps=NoSteps())


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 33])
def test_scoring_a_few_rows_gives_the_first_ratio_exactly(rows, learned):
    """A pass over few rows adds in another order on the CPU; it is filled up, so 96 sampled rows score alike in any pieces."""
    torch.manual_seed(0)
    kernel = LearnedNoise(4, (6,)) if learned else FlowSDE()
    for parameter in kernel.parameters():
        torch.nn.init.normal_(parameter)
    policy = FlowPolicy(MLPField(4, (6,), width=64), kernel, num_steps=4)
    cond, likelihood = policy.encode(torch.randn(96, 4)), ChainLikelihood("mean")
    with torch.no_grad():
        chain = policy.sample(cond, AllButLast()(0, policy.grid(4), torch.arange(96)))
        evidence = likelihood.record(policy, cond, chain, Key(0, "test"), torch.arange(96))
        part = torch.arange(rows)
        score = likelihood.score(policy, cond.index(part), evidence.index(part))
    assert torch.equal(score.log_prob, evidence.old_log_prob[:rows])


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 13])
def test_encoding_a_few_pictures_gives_the_first_ratio_exactly(rows):
    """An encoder that trains runs again on the rows of a micro-batch: its passes are filled up too."""
    torch.manual_seed(0)
    policy = FlowPolicy(PixelField((2, 3), (20, 20, 3)), FlowSDE(), num_steps=4)
    pictures, likelihood = torch.randint(0, 256, (24, 20, 20, 3), dtype=torch.uint8), ChainLikelihood("mean")
    with torch.no_grad():
        cond = policy.encode(pictures)
        chain = policy.sample(cond, AllButLast()(0, policy.grid(4), torch.arange(24)))
        evidence = likelihood.record(policy, cond, chain, Key(0, "test"), torch.arange(24))
        score = likelihood.score(policy, policy.encode(pictures[:rows]), evidence.index(torch.arange(rows)))
    assert torch.equal(score.log_prob, evidence.old_log_prob[:rows])
