"""Q-learner of SAC: E critics in one batched network, their slow copies, and the step towards a target.

    L = 1/2 sum_e E[ w (Q_e(s, a) - y)^2 ],    target <- target + tau (live - target)

The critics are one network whose matrices lead with E: a batched product in place of E small ones. LayerNorm keeps Q
bounded on actions that were never tried (Ball et al. 2023).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.functional import layer_norm, relu

from rlflow.rl.masked import weighted_sum
from rlflow.rl.optim import AdamW, Deferred
from rlflow.types import Cond


@dataclass(frozen=True)
class TwinSettings:
    """`pessimism` says which of the critics' values counts, in targets and for the actor.

    With `subset` a target is the least of that many critics, drawn anew for each step, and the actor is judged by the
    mean of all (REDQ, Chen et al. 2021; RLPD, Ball et al. 2023).
    """

    num: int = 2
    width: int = 256
    depth: int = 2
    norm: bool = True
    tau: float = 0.005
    lr: float = 3e-4
    pessimism: Literal["min", "mean"] = "min"
    subset: int | None = None

    def __post_init__(self) -> None:
        if self.subset is not None and not 1 <= self.subset <= self.num:
            raise ValueError(f"critic_subset: {self.subset} of {self.num} critics: give at most num_critics")


class Ensemble(nn.Module):
    """Q_e(features, action) of E critics: ReLU layers of one width, with LayerNorm if asked for."""

    one: Tensor
    zero: Tensor

    def __init__(self, num_inputs: int, num: int = 2, width: int = 256, depth: int = 2, norm: bool = True):
        super().__init__()
        sizes = [num_inputs, *[width] * depth, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in pairwise(sizes):
            bound = 1 / math.sqrt(a)  # as nn.Linear
            self.weights.append(nn.Parameter(torch.empty(num, a, b).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(num, 1, b).uniform_(-bound, bound)))
        shapes = [(num, 1, width)] * depth if norm else []
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(s)) for s in shapes)
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(s)) for s in shapes)
        # a ParameterList is slow to read, and this is read thousands of times a minute
        self._layers: list[Any] = list(zip_longest(self.weights, self.biases, self.gains, self.shifts))
        # without them a CPU's layer_norm takes twice as long for the same bits
        self.register_buffer("one", torch.ones(width), persistent=False)
        self.register_buffer("zero", torch.zeros(width), persistent=False)

    def forward(self, features: Tensor, action: Tensor, only: Tensor | None = None) -> Tensor:
        """(E, N) from features (N, F), which get no gradient, and actions (N, *D); of those `only` (S,), (S, N)."""
        layers = self._layers
        if only is not None:
            layers = [tuple(v if v is None else v.index_select(0, only) for v in layer) for layer in layers]
        *hidden, (w, b, _, _) = layers
        x = torch.cat([features.detach(), action.flatten(1)], -1).to(w.dtype)
        x = x.expand(len(w), *x.shape)
        for weight, bias, gain, shift in hidden:
            x = torch.baddbmm(bias, x, weight)
            x = relu(
                x if gain is None else torch.addcmul(shift, layer_norm(x, x.shape[-1:], self.one, self.zero), gain)
            )
        return (x * w.mT).sum(-1) + b.squeeze(-1)  # a product with one column is slow as a matrix product


class Twin:
    """Ensemble, target and optimiser. Features are the policy's "pooled" ones, detached.

    `autocast` is the dtype of matrix products inside; values are in that of the weights.
    """

    def __init__(
        self,
        num_inputs: int,
        settings: TwinSettings,
        device: torch.device,
        dtype: torch.dtype,
        autocast: torch.dtype | None = None,
    ):
        c = self.settings = settings
        self.autocast = autocast
        self.net = Ensemble(num_inputs, c.num, c.width, c.depth, c.norm).to(device, dtype)
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.chosen = torch.arange(c.num if c.subset is None else c.subset, device=device)  # whose least is a target
        self._slow: list[Tensor] = list(self.target.parameters())
        self._live: list[Tensor] = list(self.net.parameters())
        self.optimizer = Deferred(
            list(self.net.parameters()), AdamW(lr=c.lr, betas=(0.9, 0.999), max_grad_norm=0.0), "algorithm.critic_lr"
        )

    def each(self, cond: Cond, action: Tensor) -> Tensor:
        """(E, N) of every critic."""
        return self._values(self.net, cond, action)

    def value(self, cond: Cond, action: Tensor) -> Tensor:
        """(N,) what the actor is judged by; gradients flow to the action."""
        return self._one(self.each(cond, action))

    @torch.no_grad()
    def target_value(self, cond: Cond, action: Tensor) -> Tensor:
        """(N,) of the slow copies."""
        if self.settings.subset is None:
            return self._one(self._values(self.target, cond, action))
        return self._values(self.target, cond, action, self.chosen).amin(0)

    def _values(self, net: Ensemble, cond: Cond, action: Tensor, only: Tensor | None = None) -> Tensor:
        """(E, N), of `only` those if given."""
        with torch.autocast(action.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return net(cond["pooled"], action, only)

    def _one(self, values: Tensor) -> Tensor:
        c = self.settings
        return values.amin(0) if c.pessimism == "min" and c.subset is None else values.mean(0)

    def redraw(self, rng: torch.Generator) -> None:
        """Choose the critics of the next target, in place: nothing that was made of `chosen` has to be made anew."""
        if self.settings.subset is not None:
            self.chosen.copy_(torch.randperm(self.settings.num, generator=rng)[: self.settings.subset])

    def loss(self, cond: Cond, action: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """1/2 sum_e of the mean squared error over rows of weight (N,)."""
        error = (self.each(cond, action) - target).square().sum(0)
        return 0.5 * weighted_sum(error, weight) / weight.sum().clamp(min=1e-12)

    @property
    def moving(self) -> list[Tensor]:
        """What changes from step to step: the weights, their slow copies, and which of these are asked."""
        return [*self._live, *self._slow, self.chosen]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """One optimiser step by gradients of `optimizer.parameters`, and one of the slow copies."""
        self.optimizer.advance(gradients)
        torch._foreach_lerp_(self._slow, self._live, self.settings.tau)

    def state_dict(self) -> dict[str, Any]:
        """Weights, slow copies, optimiser."""
        nets = {"net": self.net.state_dict(), "target": self.target.state_dict()}
        return nets | {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.net.load_state_dict(state["net"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
