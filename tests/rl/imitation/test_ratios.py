"""What a fitted ratio must be: the closed form of two Gaussians, zero for equal laws, and the coupling's identities."""

import math

import pytest
import torch
from torch import Tensor

from rlflow.rl.imitation.ratios import Constant, CoupledFlows, Logistic, Ratio, donsker_varadhan

SHIFT, SPREAD = torch.tensor([0.8, -0.4]), torch.tensor([1.3, 0.8])
"""Mean and std of the agent's law; the expert's is N(0, I)."""


def exact(x: Tensor) -> Tensor:
    """log p_agent - log p_expert (N,)."""
    agent = -(((x - SHIFT) / SPREAD).square() / 2 + SPREAD.log()).sum(1)
    return agent + x.square().sum(1) / 2


def kl() -> float:
    """KL(agent || expert) of the two Gaussians."""
    return float((SHIFT.square() + SPREAD.square() - 1 - 2 * SPREAD.log()).sum() / 2)


def fitted(ratio: Ratio, mean: Tensor, std: Tensor, steps: int = 300, num: int = 256) -> Ratio:
    rng, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam(ratio.parameters(), lr=5e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / steps)
        agent, expert = mean + std * torch.randn(num, 2, generator=rng), torch.randn(num, 2, generator=rng)
        loss, _ = ratio.losses(agent, expert)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ratio


RATIOS = [CoupledFlows(2, layers=2, width=16, cap=20.0), Logistic(2, width=32, cap=20.0)]


@pytest.mark.parametrize("ratio", RATIOS, ids=["cfil", "logistic"])
@torch.no_grad()
def test_the_log_ratio_of_two_gaussians_is_recovered(ratio: Ratio) -> None:
    """Within .1 nats on average where the agent goes, and its Donsker-Varadhan value is the KL."""
    with torch.enable_grad():
        fitted(ratio, SHIFT, SPREAD)
    rng = torch.Generator().manual_seed(1)
    agent, expert = SHIFT + SPREAD * torch.randn(20_000, 2, generator=rng), torch.randn(20_000, 2, generator=rng)
    assert float((ratio(agent) - exact(agent)).abs().mean()) < 0.1
    assert float(donsker_varadhan(ratio(agent), ratio(expert))) == pytest.approx(kl(), abs=0.06)


@pytest.mark.parametrize("kind", [CoupledFlows, Logistic], ids=["cfil", "logistic"])
def test_an_agent_that_is_as_the_expert_earns_nothing(kind: type[Ratio]) -> None:
    ratio = fitted(kind(2, width=16), torch.zeros(2), torch.ones(2), steps=150)  # type: ignore[call-arg]
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert float(ratio(x).abs().mean()) < 0.08


def test_the_exact_ratio_is_the_optimum_and_its_value_the_divergence() -> None:
    """On a grid: any other x gives less than KL(agent || expert), whatever constant is added."""
    points = torch.cartesian_prod(*[torch.linspace(-7, 7, 141, dtype=torch.float64)] * 2)
    expert = -points.square().sum(1) / 2
    p, q = torch.softmax(exact(points) + expert, 0), torch.softmax(expert, 0)

    def value(x: Tensor) -> float:
        return float((p * x).sum() - (q * x.exp()).sum().log())

    x, other = exact(points), torch.sin(3 * points).sum(1)
    assert value(x) == pytest.approx(kl(), abs=1e-3)
    assert value(x + 3.7) == pytest.approx(value(x), abs=1e-9)
    for size in (-0.3, 0.1, 0.5):
        assert value(x + size * other) < value(x) - 1e-4
    assert value(x) > value(0.9 * x)


def test_the_coupling_sees_the_difference_alone() -> None:
    """Without the likelihood a common change of both log-densities has no gradient: they would drift together."""
    x = torch.randn(64, 3)
    for likelihood, drifts in ((0.0, True), (1.0, False)):
        torch.manual_seed(0)
        flows = CoupledFlows(3, likelihood=likelihood)
        flows.expert.load_state_dict(flows.agent.state_dict())
        loss, _ = flows.losses(x + 1, 2 * x)
        loss.backward()
        for mine, other in ((flows.agent.mean, flows.expert.mean), (flows.agent.log_std, flows.expert.log_std)):
            common = float((mine.grad + other.grad).abs().max())  # type: ignore[operator]
            assert (common < 1e-5) == drifts
            assert float(mine.grad.abs().max()) > 1e-2  # type: ignore[union-attr]


def test_is_bounded_and_begins_at_nothing() -> None:
    x = 50 * torch.randn(200, 3)
    flows, logistic, constant = CoupledFlows(3, cap=4.0), Logistic(3, cap=4.0), Constant(3)
    for ratio in (flows, logistic, constant):
        assert not ratio(x).any()
    with torch.no_grad():
        flows.agent.mean.fill_(3.0)
        logistic.net[-1].weight.fill_(30.0)
    for bounded in (flows, logistic):
        assert float(bounded(x).detach().abs().max()) == pytest.approx(4.0, rel=1e-3)


def test_the_estimate_of_samples_is_the_formula() -> None:
    agent, expert = torch.randn(10), torch.randn(7)
    found = float(donsker_varadhan(agent, expert))
    assert found == pytest.approx(float(agent.mean()) - math.log(float(expert.exp().mean())), abs=1e-6)
