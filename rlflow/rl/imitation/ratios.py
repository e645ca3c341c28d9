"""How much likelier the agent is than the expert to be where it is: the logarithm of a ratio of two densities.

CFIL (Freund, Sarafian, Kraus 2023) couples two flows by the Donsker-Varadhan form of a divergence, whose optimum is
x = log p_agent - log p_expert up to a constant, and whose value is then KL(agent || expert):

    x = c tanh((log p_agent - log p_expert) / c)
    loss = log E_expert[e^x] - E_agent[x] - likelihood (E_agent[log p_agent] + E_expert[log p_expert])

The first part sees the difference alone, so both densities could drift together; the likelihood of each flow's own data
holds them. -x is the reward: 0 where the agent is as the expert, and its mean over the agent's own visits is -KL.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.functional import softplus

from rlflow.models.mlp import mlp
from rlflow.ranges import Natural, NotNegative, Positive, Size
from rlflow.rl.imitation.coupling import CouplingDensity


class Ratio(nn.Module):
    """Base: `forward` gives x, `losses` what is minimised and what is logged."""

    def forward(self, x: Tensor) -> Tensor:
        """log p_agent - log p_expert (N,) at inputs (N, F)."""
        raise NotImplementedError

    def losses(self, agent: Tensor, expert: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) at inputs (N, F) of the agent and (M, F) of the expert."""
        raise NotImplementedError


def donsker_varadhan(agent: Tensor, expert: Tensor) -> Tensor:
    """E_agent[x] - log E_expert[e^x], at most KL(agent || expert), of x (N,) at the agent's, (M,) at the expert's."""
    return agent.mean() - (expert.logsumexp(0) - math.log(len(expert)))


class CoupledFlows(Ratio):
    """CFIL: two densities by couplings, bounded at +-cap nats; with `likelihood` 0, without its second part."""

    def __init__(
        self,
        num_inputs: int,
        layers: Natural = 4,
        width: Size = 64,
        cap: Positive = 10.0,
        likelihood: NotNegative = 1.0,
    ):
        super().__init__()
        self.cap, self.likelihood = cap, likelihood
        self.agent, self.expert = (CouplingDensity(num_inputs, layers, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """c tanh((log p_agent - log p_expert) / c)."""
        return self._squashed(self.agent.log_prob(x), self.expert.log_prob(x))

    def _squashed(self, agent: Tensor, expert: Tensor) -> Tensor:
        return self.cap * torch.tanh((agent - expert) / self.cap)

    def losses(self, agent: Tensor, expert: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the head of the file; logs the divergence and the mean log-likelihoods in nats per number."""
        both, num = torch.cat([agent, expert]), len(agent)
        by_agent, by_expert = self.agent.log_prob(both), self.expert.log_prob(both)
        x = self._squashed(by_agent, by_expert)
        divergence = donsker_varadhan(x[:num], x[num:])
        own = by_agent[:num].mean() + by_expert[num:].mean()
        told = {"divergence": divergence, "log_likelihood": own / (2 * agent.shape[1])}
        return self.likelihood * -own - divergence, told


class Logistic(Ratio):
    """A control: logistic regression of agent against expert by a multilayer perceptron, whose log-odds are x.

    That is the discriminator of GAIL (Ho and Ermon 2016) with the reward of AIRL (Fu et al. 2018), bounded at +-cap.
    """

    def __init__(self, num_inputs: int, width: Size = 64, depth: Size = 2, cap: Positive = 10.0):
        super().__init__()
        self.cap, self.net = cap, mlp([num_inputs, *[width] * depth, 1])
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """c tanh(log-odds / c)."""
        return self.cap * torch.tanh(self.net(x).squeeze(-1) / self.cap)

    def losses(self, agent: Tensor, expert: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of both sides; logs the divergence that its ratio tells."""
        of_agent, of_expert = self(agent), self(expert)
        loss = softplus(-of_agent).mean() + softplus(of_expert).mean()
        return loss, {"divergence": donsker_varadhan(of_agent, of_expert)}


class Constant(Ratio):
    """The other control: x = 0 everywhere, nothing to learn; the reward is `imitation.shift` at every step."""

    def __init__(self, num_inputs: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """0."""
        return x.new_zeros(len(x))

    def losses(self, agent: Tensor, expert: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Nothing is minimised."""
        return agent.new_zeros(()), {}
