"""NormGuard: nothing where |v| is at most the reference's, v / (D |v|) above it; and the norms that are logged."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from rlflow.flow.gaussian import Gaussian
from rlflow.flow.steps import NoSteps
from rlflow.rl.learners.regularizers import norm_excess, velocity_norm
from rlflow.rl.likelihoods.base import Score
from rlflow.rl.likelihoods.cfm import CFMLikelihood
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.objectives.clip import Clip
from rlflow.rl.objectives.nft import NFT
from rlflow.train.rollout_metrics import rollout_metrics

CASES = [("flow", False), ("constant", False), ("cps", False), ("ancestral", False), ("learned", False), ("flow", True)]


def make_recorded(make, kernel: str, matching: bool):
    """A composition and the evidence of a rollout whose reference said what the policy did."""
    cfm = {"likelihood": CFMLikelihood(3, joint=False), "steps": NoSteps(), "objective": NFT} if matching else {}
    parts = make(kernel=kernel, **cfm)
    rollout = parts.collect()
    evidence = rollout.evidence
    return parts, replace(evidence, ref_mean=evidence.old_mean, ref_std=evidence.old_std), rollout


def mean_at(parts, evidence, rollout, factor: float) -> tuple[Tensor, Tensor]:
    """Velocities `factor` times those of the rollout (a leaf), and the means of the distributions they give."""
    likelihood = parts.algorithm.likelihood
    v = (factor * likelihood.velocity(parts.policy, evidence, evidence.old_mean)).detach().requires_grad_(True)
    if not likelihood.scores_steps:
        return v, v
    rows = torch.arange(len(v)).repeat_interleave(v.shape[1])
    x, t, t_next = (z.flatten(0, 1) for z in (evidence.x, evidence.t, evidence.t_next))
    cond = parts.policy.encode(rollout.flat(rollout.obs)).index(rows)
    return v, parts.policy.kernel(x, v.flatten(0, 1), t, t_next, cond["pooled"]).mean.view_as(v)


@pytest.mark.parametrize(("kernel", "matching"), CASES)
@pytest.mark.parametrize("factor", [0.5, 0.999, 1.25])
def test_the_gradient_is_zero_below_and_along_v_above(make, kernel: str, matching: bool, factor: float) -> None:
    parts, evidence, rollout = make_recorded(make, kernel, matching)
    v, mean = mean_at(parts, evidence, rollout, factor)
    excess = norm_excess(
        parts.policy,
        parts.algorithm.likelihood,
        Score(evidence.old_log_prob, Gaussian(mean, evidence.old_std)),
        evidence,
    )
    (gradient,) = torch.autograd.grad(excess.sum(), v)
    if factor < 1:
        assert not excess.any()
        assert not gradient.any()
        return
    event = tuple(range(2, v.ndim))
    rms = v.detach().square().mean(event, keepdim=True).sqrt()
    numbers = v[0, 0].numel()
    torch.testing.assert_close(gradient, v.detach() / (numbers * rms), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(excess.detach(), (rms * (1 - 1 / factor)).flatten(1), rtol=1e-9, atol=1e-12)


def test_a_velocity_of_zero_has_no_gradient_and_no_nan(make) -> None:
    parts, evidence, _ = make_recorded(make, "flow", True)
    mean = torch.zeros_like(evidence.old_mean).requires_grad_(True)
    for reference in (evidence.old_mean, torch.zeros_like(mean)):
        against = replace(evidence, ref_mean=reference)
        score = Score(evidence.old_log_prob, Gaussian(mean, evidence.old_std))
        excess = norm_excess(parts.policy, parts.algorithm.likelihood, score, against)
        (gradient,) = torch.autograd.grad(excess.sum(), mean)
        assert not gradient.any()


@pytest.mark.parametrize("kernel", ["flow", "learned"])
def test_it_changes_nothing_at_the_reference_and_holds_an_inflated_policy(make, gradient, kernel: str) -> None:
    """The penalty's gradient adds to that of the objective, weight times the mean over all pairs."""
    free, guarded = (make(kernel=kernel, norm_guard=weight) for weight in (0.0, 3.0))
    (plain, _), (held, metrics) = (gradient(parts, parts.collect()) for parts in (free, guarded))
    assert metrics["policy/norm_excess"] == 0
    assert torch.equal(plain, held)
    for parts in (free, guarded):
        with torch.no_grad():
            parts.policy.field.net[-1].weight.mul_(1.5)
    (plain, _), (held, metrics) = (gradient(parts, parts.collect()) for parts in (free, guarded))
    assert metrics["policy/norm_excess"] > 0.01
    rollout = guarded.collect()
    batch = guarded.algorithm._prepare(rollout)
    guarded.algorithm.optimizer.zero_grad()
    score = guarded.algorithm.likelihood.score(guarded.policy, batch.cond(torch.arange(16)), batch.evidence)
    excess = norm_excess(guarded.policy, guarded.algorithm.likelihood, score, batch.evidence).mean()
    trained = guarded.algorithm.optimizer.parameters
    extra = torch.cat([g.flatten() for g in torch.autograd.grad(3.0 * excess, trained, materialize_grads=True)])
    torch.testing.assert_close(held - plain, extra, rtol=1e-8, atol=1e-10)


def test_norms_are_logged_with_and_without_the_guard(make) -> None:
    """Of the weights that sampled, and of the samples."""
    parts, evidence, rollout = make_recorded(make, "flow", False)
    norm = velocity_norm(parts.policy, parts.algorithm.likelihood, evidence, evidence.old_mean)
    metrics = parts.algorithm.update(rollout)
    assert metrics["policy/velocity_norm"] == pytest.approx(float(norm.mean()), rel=1e-9)
    assert "policy/norm_excess" not in metrics
    size = rollout.action.flatten(2).square().mean(2).sqrt().mean()
    assert rollout_metrics(rollout)["rollout/sample_norm"] == pytest.approx(float(size), rel=1e-6)


def test_columns_that_do_not_fit_one_pass_have_the_same_penalty(make, gradient) -> None:
    likelihood = ChainLikelihood("sum", joint=True)
    held = []
    for micro_batch in (64, 2):
        parts = make(likelihood=likelihood, norm_guard=2.0, micro_batch=micro_batch, objective=partial(Clip, low=0.2))
        with torch.no_grad():
            parts.policy.field.net[-1].weight.mul_(1.5)
        held.append(gradient(parts, parts.collect())[0])
    torch.testing.assert_close(*held, rtol=1e-9, atol=1e-11)
