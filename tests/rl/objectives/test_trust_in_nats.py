"""Flow-DPPO: a pair is left out exactly where its step is too far in nats and would go further."""

import math
from functools import partial

import pytest
import torch

from rlflow.flow.gaussian import Gaussian
from rlflow.rl.likelihoods.base import Score
from rlflow.rl.likelihoods.cfm import CFMLikelihood
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.objectives.clip import Clip
from rlflow.rl.objectives.divergence import FlowDPPO, divergence_mask, step_kl
from rlflow.rl.optim import AdamW
from rlflow.types import Evidence

MEAN = ChainLikelihood("mean")


def one_number(shift: float, std: float = 0.5) -> tuple[Score, Evidence]:
    """A step of one number, sampled at its old mean plus std, under a mean moved by `shift`."""
    old, one = torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    x_next, scale = old + std, torch.full_like(old, std)
    before = Gaussian(old, scale).log_prob(x_next, "mean", 2)
    evidence = Evidence(old, x_next, 0 * one, one, before, old, scale, one.bool())
    dist = Gaussian((old + shift).requires_grad_(), scale)
    return Score(dist.log_prob(x_next, "mean", 2), dist), evidence


@pytest.mark.parametrize(
    ("shift", "advantage", "counts"),
    [
        (0.3, 1.0, False),  # r > 1 grows, too far: left out
        (0.3, -1.0, True),  # r > 1 is pulled back
        (-0.3, -1.0, False),  # r < 1 falls, too far: left out
        (-0.3, 1.0, True),  # r < 1 is pulled back
        (0.01, 1.0, True),  # near enough, whatever the sign
        (0.01, -1.0, True),
    ],
)
def test_a_pair_counts_while_it_is_near_or_on_its_way_back(shift: float, advantage: float, counts: bool) -> None:
    """delta .01 nats: a shift of .3 at std .5 is .18, one of .01 is .0002."""
    score, evidence = one_number(shift)
    a = torch.tensor([[advantage]], dtype=torch.float64)
    out = FlowDPPO(MEAN, delta=0.01).loss(score, evidence, a)
    (slope,) = torch.autograd.grad(out.pairs.sum(), score.dist.mean)
    plain = -advantage * float((score.log_prob - evidence.old_log_prob).exp().detach()) * (0.5 - shift) / 0.25
    assert float(slope) == pytest.approx(plain if counts else 0.0)
    assert float(out.logged["policy/step_kl"]) == pytest.approx(shift**2 / (2 * 0.25))
    assert float(out.logged["policy/clip_frac"]) == (not counts)


def test_the_bound_itself_is_inside() -> None:
    ratio, a = torch.tensor([[0.1, 0.1]]), torch.ones(1, 1)
    assert divergence_mask(ratio, a, torch.tensor([[0.5, 0.5 + 1e-6]]), 0.5).tolist() == [[1, 0]]


@pytest.mark.parametrize("reduce", ["mean", "sum", "sqrt"])
def test_nats_are_per_number_whatever_the_ratio_is_of(make, reduce: str) -> None:
    """And those of the kernel: |dmu|^2 / (2 S^2) over the size of the event."""
    parts = make(likelihood=ChainLikelihood(reduce), kernel="flow")
    rollout = parts.collect()
    with torch.no_grad():
        for p in parts.policy.field.parameters():
            p.add_(0.01)
    cond = parts.policy.encode(rollout.flat(rollout.obs))
    score, e = parts.algorithm.likelihood.score(parts.policy, cond, rollout.evidence), rollout.evidence
    shift = (score.dist.mean - e.old_mean).square() / (2 * e.old_std.square())
    torch.testing.assert_close(step_kl(score, e), shift.flatten(2).mean(-1))


@pytest.mark.parametrize("name", ["flow", "cps", "ancestral"])
def test_one_bound_holds_every_kernel_through_many_steps(make, name: str) -> None:
    """Thirty epochs on one rollout: without a bound the chains go twenty times as far, a hundredth of a nat is kept."""
    delta = 1e-3

    def furthest(objective) -> float:
        parts = make(kernel=name, likelihood=MEAN, objective=objective, epochs=30, optimizer=AdamW(lr=2e-3))
        rollout = parts.collect()
        parts.algorithm.update(rollout)
        cond = parts.policy.encode(rollout.flat(rollout.obs))
        with torch.no_grad():
            return float(step_kl(MEAN.score(parts.policy, cond, rollout.evidence), rollout.evidence).mean())

    held, free = furthest(partial(FlowDPPO, delta=delta)), furthest(partial(Clip, low=1e9))
    assert math.isfinite(held)
    assert held < 3 * delta
    assert free > 5 * held


def test_evidence_without_steps_is_refused() -> None:
    for likelihood in (CFMLikelihood(3, joint=False), ChainLikelihood("sum", joint=True)):
        with pytest.raises(ValueError, match="set likelihood="):
            FlowDPPO(likelihood)
