"""Mutations of the flow core that a test must catch, and which test does: a theorem nothing can break proves nothing.

Each mutant is a mistake found in released code or easily made. Ratio tests see a mismatch of sampling and scoring and
nothing else; a wrong kernel samples and scores alike, so only the end marginal convicts it.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rlflow.flow.gaussian import Gaussian
from rlflow.flow.grid import Uniform
from rlflow.flow.kernels import CPS, Ancestral, FlowSDE, Kernel
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import DPMSolver2M
from rlflow.flow.steps import All, AllButLast, Fraction, OneRandom, Steps, Window
from rlflow.models.mlp import MLPField
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.types import Cond, Evidence

MEAN, STD = 2.0, 0.5


def end_law(kernel: Kernel, num_steps: int) -> tuple[float, float]:
    """Mean and std of the last state for data N(MEAN, STD^2) and its exact velocity, by the affine recursion."""
    mean, var = 0.0, 1.0
    for t, t_next in pairwise(Uniform()(num_steps).tolist()):
        x = torch.tensor([mean, mean + 1], dtype=torch.float64)
        share = (t * STD**2 - (1 - t)) / ((1 - t) ** 2 + (t * STD) ** 2)
        v = MEAN + share * (x - t * MEAN)
        dist = kernel(x, v, *torch.tensor([[t, t], [t_next, t_next]], dtype=torch.float64))
        var = float(dist.mean[1] - dist.mean[0]) ** 2 * var + float(dist.std[0]) ** 2
        mean = float(dist.mean[0])
    return mean, math.sqrt(var)


def keeps_the_data_law(kernel: Kernel) -> bool:
    mean, std = end_law(kernel, 1000)
    return abs(mean - MEAN) < 0.01 and abs(std - STD) < 0.005


class NoScore(FlowSDE):
    def step(self, x, v, t, t_next, hidden):
        dt = t_next - t
        return Gaussian(x + v * dt, self.g(t, t_next) * dt.sqrt())


class HalfForgotten(FlowSDE):
    def step(self, x, v, t, t_next, hidden):
        dt, g = t_next - t, self.g(t, t_next)
        return Gaussian(x + (v + g.square() * (t * v - x) / (1 - t)) * dt, g * dt.sqrt())


class NoSqrtDt(FlowSDE):
    def step(self, x, v, t, t_next, hidden):
        right = super().step(x, v, t, t_next, hidden)
        return Gaussian(right.mean, self.g(t, t_next) * (t_next - t))


class ScoreOfTheOtherConvention(FlowSDE):
    """Roles of t and 1 - t exchanged in the score."""

    def step(self, x, v, t, t_next, hidden):
        dt, g = t_next - t, self.g(t, t_next)
        score = -(x + (1 - t) * v) / torch.where(t > 0, t, t_next)
        return Gaussian(x + (v + 0.5 * g.square() * score) * dt, g * dt.sqrt())


class NoiseAtTheDataEnd(FlowSDE):
    """g rising to the data instead of falling to it."""

    def g(self, t, t_next):
        return self.a * (torch.where(t > 0, t, t_next) / (1 - t)).sqrt()


class UnscaledNoise(Ancestral):
    """The kept noise is not reduced by the fresh one."""

    def step(self, x, v, t, t_next, hidden):
        right = super().step(x, v, t, t_next, hidden)
        return Gaussian(t_next * (x + (1 - t) * v) + (1 - t_next) * (x - t * v), right.std)


class MeanForgetsEta(Ancestral):
    """The mean makes room for the noise of eta = 1."""

    def step(self, x, v, t, t_next, hidden):
        std = super().step(x, v, t, t_next, hidden).std
        keep = ((1 - t_next).square() - (std / self.eta).square()).clamp(min=0).sqrt()
        return Gaussian(t_next * (x + (1 - t) * v) + keep * (x - t * v), std)


class TestKernels:
    @pytest.mark.parametrize("kernel", [FlowSDE(0.9), Ancestral(0.7)], ids=lambda k: type(k).__name__)
    def test_the_right_ones_keep_the_data_law(self, kernel):
        assert keeps_the_data_law(kernel)

    @pytest.mark.parametrize(
        "mutant",
        [
            NoScore(0.9),
            HalfForgotten(0.9),
            NoSqrtDt(0.9),
            ScoreOfTheOtherConvention(0.9),
            NoiseAtTheDataEnd(0.9),
            UnscaledNoise(0.7),
            MeanForgetsEta(0.7),
        ],
        ids=lambda k: type(k).__name__,
    )
    def test_the_end_marginal_convicts_every_mutant(self, mutant):
        assert not keeps_the_data_law(mutant)

    @pytest.mark.parametrize("mutant", [NoScore(0.9), ScoreOfTheOtherConvention(0.9)], ids=lambda k: type(k).__name__)
    def test_while_the_ratio_acquits_it(self, mutant):
        assert float(first_log_ratio(policy(mutant), All())) == 0.0


def policy(kernel: Kernel | None = None, **kwargs: object) -> FlowPolicy:
    policy = FlowPolicy(MLPField(3, (2,), width=16), kernel or FlowSDE(0.7), num_steps=6, **kwargs)
    return policy.double().requires_grad_(False)


def recorded(policy: FlowPolicy, steps: Steps) -> tuple[Evidence, Cond]:
    cond = policy.encode(torch.linspace(-1, 1, 15).reshape(5, 3))
    plan = steps(1, policy.grid(policy.num_steps), torch.arange(5))
    key = Key(0, "sample", 1)
    with torch.no_grad():
        chain = policy.sample(cond, plan, key=key)
    return ChainLikelihood("sum").record(policy, cond, chain, key, torch.arange(5)), cond


def log_ratio(policy: FlowPolicy, evidence: Evidence, cond: Cond) -> Tensor:
    """Largest |log-ratio|, scored column by column: the row batches of sampling, so 0 means 0."""
    likelihood, rows = ChainLikelihood("sum"), torch.arange(len(cond))
    worst = torch.zeros((), dtype=torch.float64)
    for c in range(evidence.t.shape[1]):
        column = evidence.pairs(rows, torch.full_like(rows, c))
        score = likelihood.score(policy, cond, column).log_prob.detach()
        worst = torch.maximum(worst, likelihood.log_ratio(score, column).abs().max())
    return worst


def first_log_ratio(policy: FlowPolicy, steps: Steps) -> Tensor:
    return log_ratio(policy, *recorded(policy, steps))


def moved(policy: FlowPolicy) -> FlowPolicy:
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.01 * torch.randn_like(p)
    return policy


STEPS = [All(), AllButLast(2), OneRandom(), Fraction()]


@pytest.mark.parametrize("steps", STEPS, ids=repr)
class TestRatio:
    def test_is_exactly_1_at_unchanged_weights_and_not_after_an_update(self, steps):
        p = policy()
        evidence, cond = recorded(p, steps)
        assert float(log_ratio(p, evidence, cond)) == 0.0
        assert float(log_ratio(moved(p), evidence, cond)) > 1e-3

    def test_a_scoring_grid_other_than_the_sampling_grid_is_caught(self, steps, monkeypatch):
        """Released ReinFlow samples on linspace(0, 1, K) and scores on linspace(0, 1 - 1/K, K)."""
        p = policy()
        evidence, cond = recorded(p, steps)
        transition, stretch = p.transition, (p.num_steps - 1) / p.num_steps
        monkeypatch.setattr(p, "transition", lambda x, t, t_next, c: transition(x, t * stretch, t_next * stretch, c))
        assert float(log_ratio(p, evidence, cond)) > 1e-2

    def test_an_old_log_prob_taken_from_the_new_weights_is_caught_after_an_update(self, steps):
        """old = new.detach() also gives ratio 1 at first; after an update the true ratio moves, this one does not."""
        p = policy()
        evidence, cond = recorded(p, steps)
        moved(p)
        new = ChainLikelihood("sum").score(p, cond, evidence).log_prob.detach()
        mutant = replace(evidence, old_log_prob=new)
        assert float((new - mutant.old_log_prob).abs().max()) == 0.0
        assert float((new - evidence.old_log_prob).abs().max()) > 1e-3

    def test_rounding_a_sample_after_it_was_scored_is_caught(self, steps):
        p = policy()
        evidence, cond = recorded(p, steps)
        late = replace(evidence, x_next=evidence.x_next.bfloat16().double())
        assert float(log_ratio(p, late, cond)) > 1e-4
        early = policy(storage_dtype=torch.bfloat16)
        early.load_state_dict(p.state_dict())
        evidence, cond = recorded(early, steps)
        stored = replace(evidence, x_next=evidence.x_next.bfloat16().double())
        assert float(log_ratio(early, stored, cond)) == 0.0

    def test_another_rows_condition_is_caught(self, steps):
        p = policy()
        evidence, cond = recorded(p, steps)
        assert float(log_ratio(p, evidence, cond.index(torch.tensor([1, 2, 3, 4, 0])))) > 1e-2


def test_a_solver_memory_that_survives_a_scored_step_changes_the_sample():
    """What `test_policy` asserts to be dropped matters: the next multistep correction would use a stale slope."""

    class Keeping(DPMSolver2M):
        """Remembers across calls, whatever the policy passes."""

        def __init__(self):
            self.kept = None

        def __call__(self, velocity, x, t, t_next, cond, memory):
            x, self.kept = super().__call__(velocity, x, t, t_next, cond, self.kept)
            return x, self.kept

    p, finals = policy(CPS(0.7)), []
    for solver in (DPMSolver2M(), Keeping()):
        p.solver = solver
        plan = Window(size=1, every=1, skip_last=1)(3, p.grid(p.num_steps), torch.arange(5))
        finals.append(p.sample(p.encode(torch.ones(5, 3)), plan, key=Key(0, "sample")).final)
    assert float((finals[0] - finals[1]).abs().max()) > 1e-4
