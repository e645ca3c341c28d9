"""Network passes of whatever runs: listened to, and run again bare, which an iteration cannot be faster than."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.types import Tree, tree_map


def listen(field: VelocityField, run: Callable[[], None]) -> list[tuple[int, bool]]:
    """(rows, with a backward) of every network pass of `run`."""
    seen: list[tuple[int, bool]] = []

    def note(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append((len(inputs[0]), torch.is_grad_enabled()))

    hook = field.register_forward_pre_hook(note)
    run()
    hook.remove()
    return seen


class Bare:
    """Network passes at given shapes and precision, all of one observation (1, ...), and nothing else."""

    def __init__(
        self, field: VelocityField, precision: torch.dtype | None, passes: list[tuple[int, bool]], obs: Tree
    ) -> None:
        self.field, self.precision, self.passes = field, precision, passes
        sizes, place = {n for n, _ in passes}, next(field.parameters()).device
        self.obs = tree_map(lambda v: v.to(place), obs)
        self.x = {n: torch.randn(n, *self.field.event_shape, device=place) for n in sizes}
        self.t = {n: torch.full((n,), 0.3, device=place) for n in sizes}
        self.rows = {n: torch.zeros(n, dtype=torch.long, device=place) for n in sizes}

    def __call__(self, iteration: int) -> None:
        for n, backward in self.passes:
            half = torch.autocast(self.t[n].device.type, self.precision, self.precision is not None)
            with torch.set_grad_enabled(backward), half:
                cond = self.field.encode(self.obs).index(self.rows[n])
                v = self.field(self.x[n], self.t[n], torch.zeros_like(self.t[n]), cond)
            if backward:
                torch.autograd.backward(v, self.x[n])
        for p in self.field.parameters():
            p.grad = None
