"""Guidance as a wrapper of the field, so that sampling, chain scoring and the reference share it.

A guided field is not E[x_1 - x_0 | x_t] of its own samples, so matching losses read `unguided`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlflow.flow.field import Around, VelocityField
from rlflow.flow.path import at_least_float, expand
from rlflow.ranges import Positive, Scale, Unit
from rlflow.types import Cond

CONSTANT = "constant"
"""Of a condition: the unconditional velocities of its rows, from sampling at the same weights."""


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Per-row inner product (N, 1, ..., 1)."""
    return expand((a * b).flatten(1).sum(-1), a)


class CFG(Around):
    """Classifier-free guidance v_u + w (v_c - v_u) (Ho & Salimans 2022), both branches in one network call.

    `detach` takes the unconditional branch as a constant, without a graph: no backward pass, and so a call of its own
    (as the first Flow-GRPO release; the gradient is another one than with both). A condition may hold that constant,
    as `constant` (N, *D): it is not computed then.
    """

    def __init__(self, field: VelocityField, scale: Scale, detach: bool = False):
        super().__init__(field)
        self.scale, self.detach = scale, detach
        self.calls = 2 * field.calls
        self.graph_calls = field.graph_calls * (1 if detach else 2)
        self.constant_calls = field.calls if detach else 0

    @property
    def unguided(self) -> VelocityField:
        """The inner field."""
        return self.field

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Guided velocity (N, *D)."""
        if self.detach and CONSTANT in cond.data:
            v_null, own = cond[CONSTANT], Cond({n: v for n, v in cond.data.items() if n != CONSTANT}, cond.rows)
            return self.combine(at_least_float(self.field(x, t, dt, own)), v_null, t)
        # on a CPU a row is the same in any company, and costs less in more of it; padded text would not be the same
        together = not torch.is_grad_enabled() and x.device.type == "cpu" and not self.ragged
        if self.detach and not together:
            with torch.no_grad():
                v_null = at_least_float(self.field(x, t, dt, self.field.null(cond)))
            self.constant = None if torch.is_grad_enabled() else v_null
            return self.combine(at_least_float(self.field(x, t, dt, cond)), v_null, t)
        both = Cond.cat([cond, self.field.null(cond)])
        twice = [torch.cat([z, z]) for z in (x, t, dt)]
        v_cond, v_null = at_least_float(self.field(*twice, both)).chunk(2)  # w amplifies half-precision rounding
        self.constant = v_null if self.detach else None
        return self.combine(v_cond, v_null, t)

    def combine(self, v_cond: Tensor, v_null: Tensor, t: Tensor) -> Tensor:
        """v_u + w (v_c - v_u)."""
        return v_null + self.scale * (v_cond - v_null)


class CFGNorm(CFG):
    """CFG that keeps the length of v_c: v_g |v_c| / |v_g|, v_g = v_u + w (v_c - v_u) (Lin et al. 2024; Qwen-Image).

    With `cap` only where v_g is longer than cap times that (Z-Image's `cfg_normalization`). The length is the model's
    affair (`VelocityField.lengths`): of a whole sample, or of each of its tokens.
    """

    def __init__(self, field: VelocityField, scale: Scale, cap: Positive | None = None, detach: bool = False):
        super().__init__(field, scale, detach)
        self.cap = cap

    def combine(self, v_cond: Tensor, v_null: Tensor, t: Tensor) -> Tensor:
        """v_g |v_c| / |v_g|, or v_g min(1, cap |v_c| / |v_g|)."""
        guided, lengths = super().combine(v_cond, v_null, t), self.field.lengths
        ratio = lengths(v_cond) / lengths(guided).clamp(min=torch.finfo(guided.dtype).tiny)
        return guided * (ratio if self.cap is None else (self.cap * ratio).clamp(max=1.0))


class CFGZero(CFG):
    """CFG-Zero*: v_u scaled by its projection on v_c, and a zero velocity for t < `zero_until` (Fan et al. 2025)."""

    def __init__(self, field: VelocityField, scale: Scale, zero_until: Unit = 0.04, detach: bool = False):
        super().__init__(field, scale, detach)
        self.zero_until = zero_until

    def combine(self, v_cond: Tensor, v_null: Tensor, t: Tensor) -> Tensor:
        """s v_u + w (v_c - s v_u), s = <v_c, v_u> / |v_u|^2 per row."""
        s = _inner(v_cond, v_null) / _inner(v_null, v_null).clamp(min=torch.finfo(v_null.dtype).tiny)
        guided = s * v_null + self.scale * (v_cond - s * v_null)
        return torch.where(expand(t < self.zero_until, guided), 0.0, guided)
