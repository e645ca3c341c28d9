"""Boundary RF (Hu et al. 2025): a velocity that is right at t = 1 by construction, in its masked form.

    v = (1 - t^p) f + t^p x       so that v(x, 1) = x = E[x_1 - x_0 | x_1 = x], and x1_hat(x, 1) = x

The score (t v - x) / (1 - t) then has no pole: it tends to p f - (p + 1) x, and an error e of the network moves it by
t (1 - t^p) / (1 - t) e, at most p e, where without it moves by t / (1 - t) e. Steps with noise multiply that error.
"""

from __future__ import annotations

from torch import Tensor

from rlflow.flow.field import Around, VelocityField
from rlflow.flow.path import at_least_float, expand
from rlflow.models.io import load_field
from rlflow.ranges import Positive
from rlflow.types import Cond


class Boundary(Around):
    """`field` with the boundary condition; p is `power`: the larger, the nearer to t = 1 anything changes."""

    def __init__(self, field: VelocityField, power: Positive = 8.0):
        super().__init__(field)
        if field.uses_dt or field is not field.unguided:
            raise ValueError(
                f"Boundary holds for the velocity of an instant, and not for {type(field).__name__}: it goes around a "
                "field that knows no averages, and inside of guidance"
            )
        self.power = power

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, *D)."""
        data = expand(t, x) ** self.power
        return (1 - data) * at_least_float(self.field(x, t, dt, cond)) + data * x


def boundary(checkpoint: str, power: Positive = 8.0) -> Boundary:
    """A checkpoint's network whose velocity at t = 1 is x: v = (1 - t^power) f + t^power x."""
    field = Boundary(load_field(checkpoint), power)
    field.args, field.builder = {"checkpoint": checkpoint, "power": power}, "rlflow.models.boundary:boundary"
    return field
