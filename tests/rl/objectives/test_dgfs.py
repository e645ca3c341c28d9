"""Sub-trajectory balance: nothing is left at the tilted chain, and a shift of all rewards moves F alone."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from rlflow.flow.gaussian import Gaussian
from rlflow.flow.steps import AllButLast, Fraction, Window
from rlflow.rl.likelihoods.cfm import CFMLikelihood
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.objectives.dgfs import DGFS, _gains, sub_trajectory_balance

SUM = ChainLikelihood("sum")
GRID = torch.linspace(0, 1, 5, dtype=torch.float64)


def linear_chain(num: int = 6, c: float = 1.3) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios (N, R), F (N, R) and the end's reward (N, 1) of a linear Gaussian chain tilted by exp(c x_R), exact.

    x' = a x + b + s noise; F_k(x) = c A_k x + sum of c A b + (c A s)^2 / 2 over the steps left, A_k the product of a's.
    """
    g = torch.Generator().manual_seed(0)
    a, b, s = (torch.rand(num, generator=g, dtype=torch.float64) + shift for shift in (0.5, -0.5, 0.2))
    ahead = torch.cat([a.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])
    step = c * ahead[1:] * b + 0.5 * (c * ahead[1:] * s).square()
    left = torch.cat([step.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    x, ratios, flows = torch.randn(50, 1, generator=g, dtype=torch.float64), [], []
    for k in range(num):
        flows.append(c * ahead[k] * x + left[k])
        mean, std = a[k] * x + b[k], s[k].expand(50, 1)
        tilted = Gaussian(mean + s[k] ** 2 * c * ahead[k + 1], std)
        x = tilted.mean + std * torch.randn(50, 1, generator=g, dtype=torch.float64)
        ratios.append(tilted.log_prob(x, "sum") - Gaussian(mean, std).log_prob(x, "sum"))
    return torch.stack(ratios, 1), torch.cat(flows, 1), c * x


def test_nothing_is_left_at_the_tilted_chain() -> None:
    ratio, flow, end = linear_chain()
    for lam in (0.0, 0.5, 1.0):
        assert float(sub_trajectory_balance(ratio - _gains(flow, end), lam).max()) < 1e-24
    assert float(sub_trajectory_balance(ratio + _gains(flow, end), 0.5).min()) > 1e-3, "with the other sign there is"


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_is_the_weighted_mean_of_all_spans(lam: float) -> None:
    """lam 0: of single steps; lam 1: of all alike."""
    left = torch.randn(4, 5, dtype=torch.float64)
    total, weights = torch.zeros(4, dtype=torch.float64), 0.0
    for i in range(5):
        for j in range(i + 1, 6):
            total += lam ** (j - i - 1) * left[:, i:j].sum(1).square()
            weights += lam ** (j - i - 1)
    torch.testing.assert_close(sub_trajectory_balance(left, lam), total / weights)


def test_a_shift_of_all_rewards_moves_f_alone() -> None:
    _, flow, end = linear_chain()
    torch.testing.assert_close(_gains(flow + 3.0, end + 3.0), _gains(flow, end))


def test_first_gradient_is_that_of_the_loss(make, gradient) -> None:
    """By autograd through the whole of it, F held; a critic of 0 leaves the reward at the last step."""
    parts = make(steps=AllButLast(), likelihood=SUM, objective=partial(DGFS, scale=2.0, lam=0.5))
    rollout = parts.collect()
    found, _ = gradient(parts, rollout)
    advantage = parts.algorithm.advantage(rollout, None, None).advantage[0]
    e = rollout.evidence
    score = SUM.score(parts.policy, parts.policy.encode(rollout.flat(rollout.obs)), e)
    gain = torch.zeros_like(e.t)
    gain[:, -1] = 2.0 * advantage
    left = score.log_prob - e.old_log_prob - gain  # the reference is what sampled
    wanted = torch.autograd.grad(sub_trajectory_balance(left, 0.5).mean(), list(parts.policy.field.parameters()))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in wanted]))


def test_columns_that_do_not_follow_each_other_and_other_evidence_are_refused(make) -> None:
    objective, rows = DGFS(SUM), torch.arange(8)
    for steps in (AllButLast(), Window(size=2, skip_last=1)):
        objective.check_steps(steps(0, GRID, rows))
    with pytest.raises(ValueError, match="adjacent steps"):
        objective.check_steps(Fraction(0.7, skip_last=0)(0, GRID, rows))
    for likelihood in (CFMLikelihood(3, joint=False), ChainLikelihood("mean"), ChainLikelihood("sum", joint=True)):
        with pytest.raises(ValueError, match="reduce: sum"):
            DGFS(likelihood)
    parts = make(steps=AllButLast(), likelihood=SUM, objective=DGFS, micro_batch=2)
    with pytest.raises(ValueError, match=r"^algorithm\.micro_batch: DGFS needs the 4 columns"):
        parts.iterate(0)


def test_reports_log_z(make) -> None:
    parts = make(steps=AllButLast(), likelihood=SUM, objective=DGFS)
    assert parts.iterate(0)["policy/log_z"] == 0
    assert math.isfinite(parts.iterate(1)["policy/log_z"])
