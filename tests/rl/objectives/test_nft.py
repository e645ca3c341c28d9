"""DiffusionNFT: its loss in closed form, its gradient, its optimum, and the weights that sample."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from rlflow.config import recipes
from rlflow.flow.steps import NoSteps
from rlflow.rl.likelihoods.cfm import CFMLikelihood
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.objectives.nft import NFT, _error
from rlflow.types import Evidence

DRAWS = CFMLikelihood(3, joint=False)


def evidence_of(num: int = 5, draws: int = 3, size: tuple[int, ...] = (2, 4)) -> Evidence:
    """Random samples, noises and times, and sampling velocities."""
    x_0, x_1, v_old = torch.randn(3, num, draws, *size, dtype=torch.float64)
    t = torch.rand(num, draws, dtype=torch.float64)
    return Evidence(x_0, x_1, t, torch.ones_like(t), -t, v_old, torch.ones_like(v_old), torch.ones_like(t).bool())


class TestLoss:
    @pytest.mark.parametrize("beta", [0.1, 1.0])
    def test_is_that_of_the_paper_one_number_at_a_time(self, beta):
        e, v = evidence_of(size=(4,)), torch.randn(5, 3, 4, dtype=torch.float64)
        advantage = torch.tensor([[-9.0], [-2.0], [0.0], [1.0], [5.0]], dtype=torch.float64)
        found = NFT(DRAWS, beta).of(v, e, advantage)
        for i in range(5):
            good = min(1.0, max(0.0, float(advantage[i]) / 10 + 0.5))
            for s in range(3):
                t, total = float(e.t[i, s]), 0.0
                x_t = (1 - t) * e.x[i, s] + t * e.x_next[i, s]
                for share, sign in ((good, 1), (1 - good, -1)):
                    w = (1 - sign * beta) * e.old_mean[i, s] + sign * beta * v[i, s]
                    miss = x_t + (1 - t) * w - e.x_next[i, s]
                    total += share * float(miss.square().mean() / miss.abs().mean()) / beta
                assert float(found[i, s]) == pytest.approx(5 * total)

    @pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
    def test_gradient_at_the_sampling_weights_is_the_clipped_advantage_times_that_of_the_error(self, beta):
        """For every b, so b decides only what happens further away."""
        e = evidence_of()
        advantage = torch.tensor([[-9.0], [-2.0], [0.0], [1.0], [5.0]], dtype=torch.float64)
        v = e.old_mean.clone().requires_grad_()
        (found,) = torch.autograd.grad(NFT(DRAWS, beta).of(v, e, advantage).sum(), v)
        (error,) = torch.autograd.grad(_error(v, e).sum(), v)
        expected = advantage.clamp(-5, 5)[..., None, None] * error
        torch.testing.assert_close(found, expected)

    def test_what_was_not_carried_out_has_no_gradient_and_changes_nothing(self):
        """The last action of a chunk of two, cut off by the end of an episode."""
        counts = torch.tensor([True, False])[:, None].expand(5, 3, 2, 4)
        e, advantage = replace(evidence_of(), counts=counts), torch.ones(5, 1, dtype=torch.float64)
        v = torch.randn_like(e.old_mean).requires_grad_()
        loss = NFT(DRAWS).of(v, e, advantage)
        (gradient,) = torch.autograd.grad(loss.sum(), v)
        assert not gradient[~counts].any()
        assert gradient[counts].all()
        torch.testing.assert_close(NFT(DRAWS).of(torch.where(counts, v, 9.0), e, advantage), loss)

    def test_without_an_advantage_both_branches_pull_alike(self):
        e = evidence_of()
        zero, d = torch.zeros(5, 1, dtype=torch.float64), torch.randn_like(e.old_mean)
        ahead, behind = (NFT(DRAWS, 0.7).of(e.old_mean + s * d, e, zero) for s in (1, -1))
        torch.testing.assert_close(ahead, behind)

    def test_where_all_errors_weigh_alike_the_best_velocity_is_that_of_the_paper(self):
        """v_old + (2 / b) E[r] (v_plus - v_old), v_plus = E[r u] / E[r], for one x_t that many samples share.

        v_old is E[u] = 0. A second number that is 1e6 off in both branches makes every weight the same.
        """
        beta, num = 0.5, 4000
        u = torch.randn(num, 1, 1, dtype=torch.float64)
        u = u - u.mean()
        t, zero = torch.full((num, 1), 0.3, dtype=torch.float64), torch.zeros(num, 1, 2, dtype=torch.float64)
        e = Evidence(zero, torch.cat([u, torch.full_like(u, 1e6)], -1), t, t, t, zero, zero + 1, t.bool())
        advantage = u[:, 0].clamp(-5, 5)
        good = advantage / 10 + 0.5
        best = 2 / beta * good.mean() * (good * u[:, 0]).mean() / good.mean()

        def slope(value: Tensor) -> float:
            w = value.clone().requires_grad_()
            v = torch.stack([w, torch.zeros_like(w)]).expand(num, 1, 2)
            (found,) = torch.autograd.grad(NFT(DRAWS, beta).of(v, e, advantage).mean(), w)
            return float(found)

        assert slope(0 * best) < 0
        assert abs(slope(best)) < 1e-4 * abs(slope(0 * best))


class TestLearner:
    def test_the_old_weights_sample_and_follow(self, make):
        """Wholly up to `flat` optimiser steps, two an iteration; then a share min(rate x iteration, max) of them stays."""
        parts = make(
            steps=NoSteps(),
            likelihood=DRAWS,
            objective=partial(NFT, old_rate=0.1, old_max=0.5, old_flat=2),
            num_minibatches=2,
            collector={"sample_with": "old"},
        )
        weights = parts.policy.weights
        for iteration, stays in enumerate([0.0, 0.2, 0.4, 0.5]):
            rollout, before = parts.collect(iteration), {n: v.clone() for n, v in weights.sets["old"].items()}
            with weights.using("old"), torch.no_grad():
                cond = parts.policy.encode(rollout.flat(rollout.obs))
                score = DRAWS.score(parts.policy, cond, rollout.evidence)
            torch.testing.assert_close(score.dist.mean, rollout.evidence.old_mean, rtol=0, atol=0)
            metrics = parts.algorithm.update(rollout)
            assert ("policy/first_log_ratio_max" in metrics) == (iteration == 0)
            assert metrics["optim/grad_norm"] > 0
            for name, live in weights.parameters().items():
                expected = stays * before[name] + (1 - stays) * live.detach()
                torch.testing.assert_close(weights.sets["old"][name], expected)

    @pytest.mark.parametrize("micro_batch", [3, 5, 1000])
    def test_first_gradient_is_the_advantage_times_that_of_the_error(self, make, gradient, micro_batch):
        """However the pairs are cut into passes."""
        parts = make(steps=NoSteps(), likelihood=DRAWS, objective=NFT, micro_batch=micro_batch)
        rollout = parts.collect()
        found, metrics = gradient(parts, rollout)
        advantage = parts.algorithm.advantage(rollout, None, None).advantage[0]
        score = DRAWS.score(parts.policy, parts.policy.encode(rollout.flat(rollout.obs)), rollout.evidence)
        error = _error(score.dist.mean, rollout.evidence).mean(1)
        wanted = torch.autograd.grad((advantage * error).mean(), list(parts.policy.field.parameters()))
        torch.testing.assert_close(found, torch.cat([g.flatten() for g in wanted]))
        assert metrics["policy/first_log_ratio_max"] == 0

    def test_other_evidence_is_refused(self, make):
        for likelihood in (CFMLikelihood(3, joint=True), ChainLikelihood("mean")):
            with pytest.raises(ValueError, match=r"set likelihood=\{name: cfm, joint: false\}"):
                make(steps=None if likelihood.scores_steps else NoSteps(), likelihood=likelihood, objective=NFT)

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("likelihood=cfm", r"algorithm\.objective: nft is a loss of matching draws: set likelihood="),
            ("algorithm.objective.target_kl=0.1", r"algorithm\.objective\.target_kl: nft has no such setting"),
            ("algorithm.objective=guard", r"algorithm\.objective: GRPO-Guard"),
            ("algorithm.objective.beta=0", r"algorithm\.objective\.beta: must be positive"),
            ("algorithm.objective.old_max=1", r"algorithm\.objective\.old_max: must be in \[0, 1\)"),
            (
                "algorithm.objective.betta=1",
                r"algorithm\.objective\.betta: nft has no such setting; did you mean 'beta'",
            ),
            ("policy.guidance={name: cfg, scale: 2}", "guid"),
        ],
    )
    def test_a_recipe_that_cannot_be_is_refused(self, override, said):
        from rlflow.assembly.parts import make_parts

        with pytest.raises(ValueError, match=said):
            make_parts(recipes.load("t2i_nft", [override]))
