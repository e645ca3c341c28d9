"""A checkpoint's network with Boundary RF around it, as a model that a recipe can name."""

from __future__ import annotations

from rlflow.flow.boundary import Boundary
from rlflow.models.io import load_field
from rlflow.ranges import Positive


def boundary(checkpoint: str, power: Positive = 8.0) -> Boundary:
    """A checkpoint's network whose velocity at t = 1 is x: v = (1 - t^power) f + t^power x."""
    field = Boundary(load_field(checkpoint), power)
    field.args, field.builder = {"checkpoint": checkpoint, "power": power}, "rlflow.models.boundary:boundary"
    return field
