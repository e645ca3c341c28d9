"""AWM: at the sampling weights the gradient is the advantage times that of the matching loss; a distance holds it."""

from dataclasses import replace

import pytest
import torch

from rlflow.flow.gaussian import Gaussian
from rlflow.flow.steps import NoSteps
from rlflow.rl.likelihoods.base import Score
from rlflow.rl.likelihoods.cfm import CFMLikelihood
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.objectives.awm import AWM, velocity_distance
from rlflow.types import Evidence
from tests.rl.objectives.test_nft import evidence_of

DRAWS = CFMLikelihood(3, joint=False, supervise="sample", normalize=True, stratified=True)


def recorded() -> Evidence:
    """Random draws, with the losses that the sampling velocities have there."""
    e = evidence_of()
    return replace(e, old_log_prob=DRAWS._minus_loss(e.old_mean, e))


def scored(v: torch.Tensor, evidence, likelihood: CFMLikelihood = DRAWS) -> Score:
    return Score(likelihood._minus_loss(v, evidence), Gaussian(v, evidence.old_std))


def test_first_gradient_is_the_advantage_times_that_of_the_loss(make, gradient) -> None:
    """Whatever the distance weighs: it has no slope there."""
    parts = make(steps=NoSteps(), likelihood=DRAWS, objective=AWM, micro_batch=5)
    rollout = parts.collect()
    found, metrics = gradient(parts, rollout)
    advantage = parts.algorithm.advantage(rollout, None, None).advantage[0]
    score = DRAWS.score(parts.policy, parts.policy.encode(rollout.flat(rollout.obs)), rollout.evidence)
    loss = (advantage * -score.log_prob.mean(1)).mean()
    wanted = torch.autograd.grad(loss, list(parts.policy.field.parameters()))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in wanted]))
    assert metrics["policy/first_log_ratio_max"] == 0
    assert metrics["policy/velocity_shift"] == 0


def test_the_distance_is_the_mean_square_of_velocities_and_is_weighed_by_trust() -> None:
    e = recorded()
    v = e.old_mean + 0.2
    score, a = scored(v, e), torch.ones(5, 1, dtype=torch.float64)
    torch.testing.assert_close(velocity_distance(score, e), torch.full((5, 3), 0.04, dtype=torch.float64))
    apart = AWM(DRAWS, trust=2.0).loss(score, e, a).pairs - AWM(DRAWS, trust=0.0).loss(score, e, a).pairs
    torch.testing.assert_close(apart, torch.full((5, 3), 0.08, dtype=torch.float64))


def test_a_bad_sample_is_let_go_of_far_away() -> None:
    """Where A < 0 the slope vanishes as the loss grows; A D alone would push for ever."""
    e, a = recorded(), -torch.ones(5, 1, dtype=torch.float64)

    def slope(distance: float) -> float:
        v = (e.x_next - e.x + distance).requires_grad_()
        (g,) = torch.autograd.grad(AWM(DRAWS, trust=0.0).loss(scored(v, e), e, a).pairs.sum(), v)
        return float(g.abs().mean())

    assert slope(40.0) < 1e-3 * slope(1.0)


def test_other_evidence_is_refused() -> None:
    for likelihood in (CFMLikelihood(3, joint=True), ChainLikelihood("mean")):
        with pytest.raises(ValueError, match=r"set likelihood=\{name: cfm, joint: false\}"):
            AWM(likelihood)
