"""Plans: a flow of the states to come, given the observation and a return; actions by inverse dynamics.

Guided Flows (Zheng et al. 2023), planning as in Decision Diffuser (Ajay et al. 2023): what is denoised is the way
through the states, d_i = (s_{t+i+1} - s_{t+i}) / std, i < H, of normalised states; a_{t+i} = inverse(s_{t+i}, d_i).
Differences, since states change little in a step: an error of a hundredth of a state is all of a small one. The first
few actions are carried out, then another plan is made (receding horizon). A plan has no density as an action, so such
policies are deployed, not fine-tuned by ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.models.goals.returns import ReturnField
from rlflow.models.mlp import mlp
from rlflow.ranges import Size
from rlflow.types import Cond, Tree

LEAST = 1e-3
"""Of the spread of a step, in standard deviations of the state."""


class PlanField(VelocityField):
    """v(plan, t | obs, target), plans (H, S) of steps between states; `act` gives the first `executed` actions of one.

    `obs_dim` counts the target: S is one less. `action_shape` is that of one primitive action.
    """

    spread: Tensor

    def __init__(
        self,
        obs_dim: int,
        action_shape: Sequence[int],
        horizon: Size = 8,
        executed: Size = 4,
        width: Size = 256,
        depth: Size = 3,
    ):
        super().__init__()
        if not executed <= horizon:
            raise ValueError(f"executed={executed}: a plan of {horizon} states has no more actions than that")
        self.args = {"obs_dim": obs_dim, "action_shape": list(action_shape), "horizon": horizon}
        self.args |= {"executed": executed, "width": width, "depth": depth}
        self.states, self.executed, self.action_shape = obs_dim - 1, executed, tuple(action_shape)
        self.event_shape = (horizon, self.states)
        self.told = ReturnField(obs_dim, self.event_shape, width, depth)
        self.num_features = self.told.num_features
        self.register_buffer("spread", torch.ones(self.states))
        self.inverse = mlp([2 * self.states, width, width, math.prod(action_shape)])

    def encode(self, obs: Tree) -> Cond:
        """As ReturnField."""
        return self.told.encode(obs)

    def null(self, cond: Cond) -> Cond:
        """As ReturnField."""
        return self.told.null(cond)

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, H, S)."""
        return self.told(x, t, dt, cond)

    def fit_spread(self, states: Tensor) -> None:
        """The std of the steps between normalised states (M, 2, S)."""
        self.spread.copy_((states[:, 1] - states[:, 0]).std(0).clamp(min=LEAST))

    def normalise(self, states: Tensor) -> Tensor:
        """States (..., S) as the network reads them."""
        blank = states.new_zeros(*states.shape[:-1], 1)
        flat = torch.cat([states, blank], -1).flatten(0, -2)
        return self.told.normalizer(flat)[:, :-1].view(states.shape)

    def actions_between(self, states: Tensor) -> Tensor:
        """(N, n, *A) that lead through normalised states (N, n + 1, S)."""
        return self._actions(states[:, :-1], self.steps_between(states))

    def steps_between(self, states: Tensor) -> Tensor:
        """(N, n, S), the plan that leads through normalised states (N, n + 1, S)."""
        return (states[:, 1:] - states[:, :-1]) / self.spread

    def _actions(self, states: Tensor, steps: Tensor) -> Tensor:
        return self.inverse(torch.cat([states, steps], -1)).unflatten(-1, self.action_shape)

    def act(self, x: Tensor, cond: Cond) -> Tensor:
        """(N, executed, *A) in [-1, 1] that begin plans (N, H, S) at the observations of `cond`."""
        now, steps = cond["pooled"][:, : self.states].to(x).unsqueeze(1), x[:, : self.executed]
        before = now + (steps * self.spread).cumsum(1) - steps * self.spread
        return self._actions(before, steps).clamp(-1, 1)
