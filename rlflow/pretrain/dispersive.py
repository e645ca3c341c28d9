"""Dispersive losses: what hidden layers make of different rows is pushed apart while a policy is learnt.

Wang and He 2025 (Diffuse and Disperse); for one-call policies MP1 (Sheng et al. 2025) and DM1 (Zou et al. 2025). Of the
features h_i of N rows, with D_ij = |h_i - h_j|^2 / width,

    mp1         log mean_ij exp(-D_ij / max D)
    infonce     log mean_{i != j} exp(-D_ij / tau)                        tau .5
    cosine      log mean_{i != j} exp(cos(h_i, h_j) / tau)                tau .5
    hinge       mean_{i != j} relu(margin - D_ij)^2                       margin 2
    covariance  (sum_{k != l} C_kl^2 + sum_k relu(1 - C_kk)) / width,     C the covariance of the features

Inflated features are far apart and say nothing more, so features are first divided by their root mean square over the
batch: a loss then does not depend on their scale, its gradient is orthogonal to them, and cannot inflate them. Without
it, at scale 1, it is nearly all inflation, and DM1's own masked and clamped form has none at all. Where features are
centred the mean of D is 2: the margin of 1 that is published for them as they come leaves no pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.functional import normalize, relu

from rlflow.flow.field import VelocityField
from rlflow.flow.matching import MatchingLoss, Scheduled, loss_at
from rlflow.flow.path import at_least_float
from rlflow.types import Cond

TAU, MARGIN = 0.5, 2.0
Variant = Callable[[Tensor], Tensor]
"""Features (N, F) of root mean square 1 to a loss ()."""


def distances(h: Tensor) -> Tensor:
    """(N, N) mean squared differences of features (N, F)."""
    square = h.square().sum(1)
    return (square[:, None] + square - 2 * h @ h.T).clamp(min=0) / h.shape[1]


def others(pairs: Tensor) -> Tensor:
    """(N (N - 1),) entries of pairs (N, N) of different rows."""
    return pairs[~torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)]


def log_mean_exp(values: Tensor) -> Tensor:
    """Log of the mean of exp, of any shape."""
    return values.flatten().logsumexp(0) - math.log(values.numel())


def mp1(h: Tensor) -> Tensor:
    """MP1's, which needs no normalisation: the largest distance is its unit."""
    far = distances(h)
    return log_mean_exp(-far / far.max().clamp(min=1e-12))


def infonce(h: Tensor) -> Tensor:
    """By distance."""
    return log_mean_exp(others(-distances(h) / TAU))


def cosine(h: Tensor) -> Tensor:
    """By angle."""
    direction = normalize(h, dim=1)
    return log_mean_exp(others(direction @ direction.T / TAU))


def hinge(h: Tensor) -> Tensor:
    """Of pairs nearer than the margin."""
    return relu(MARGIN - others(distances(h))).square().mean()


def covariance(h: Tensor) -> Tensor:
    """Features that vary, and not together."""
    centred = h - h.mean(0)
    c = centred.T @ centred / (len(h) - 1)
    return (others(c).square().sum() + relu(1 - c.diagonal()).sum()) / len(c)


VARIANTS: dict[str, Variant] = {
    "mp1": mp1,
    "infonce": infonce,
    "cosine": cosine,
    "hinge": hinge,
    "covariance": covariance,
}


def shuffled(h: Tensor) -> Tensor:
    """Every feature (N, F) over other rows: what a row was is lost, what a feature was stays (a control)."""
    return h.gather(0, torch.rand(h.shape, device=h.device).argsort(0))


@dataclass(frozen=True)
class Dispersive(Scheduled):
    """`inner`, and `weight` times the sum over `layers`, names of submodules of the field, of a variant.

    A layer answers (N, ...) in the pass that learns; targets and inference are not looked at. `shuffle` is a control.
    """

    inner: MatchingLoss | Scheduled
    layers: Sequence[str]
    variant: Variant = mp1
    weight: float = 0.5
    shuffle: bool = False

    def __post_init__(self) -> None:
        if not self.layers or self.weight < 0:
            raise ValueError(f"dispersive needs layers and weight >= 0, got {list(self.layers)} and {self.weight}")

    def at(self, progress: float, teacher: VelocityField) -> MatchingLoss:
        """The inner loss of then, and the term."""
        inner = loss_at(self.inner, progress, teacher)

        def loss(field: VelocityField, x_1: Tensor, cond: Cond, x_0: Tensor, t: Tensor) -> Tensor:
            with heard(field, self.layers) as features:
                errors = inner(field, x_1, cond, x_0, t)
            return errors + self.weight * sum(self.term(features[name]) for name in self.layers)

        return loss

    def term(self, features: Tensor) -> Tensor:
        """() of what a layer answered (N, ...)."""
        h = unit(at_least_float(features).flatten(1))
        return self.variant(shuffled(h) if self.shuffle else h)


def unit(h: Tensor) -> Tensor:
    """Features (N, F) of root mean square 1 over the batch."""
    return h * (h.square().mean() + 1e-12).rsqrt()


@contextmanager
def heard(field: VelocityField, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the named layers answer inside, where gradients are kept; ValueError for a name that the field lacks."""
    modules: dict[str, nn.Module] = dict(field.named_modules())
    if unknown := sorted(set(layers) - set(modules)):
        raise ValueError(f"{type(field).__name__} has no layers {unknown}; it has {sorted(set(modules) - {''})}")
    found: dict[str, Tensor] = {}

    def listener(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def listen(module: nn.Module, args: Any, output: Tensor) -> None:
            if torch.is_grad_enabled():
                found[name] = output

        return listen

    handles = [modules[name].register_forward_hook(listener(name)) for name in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
