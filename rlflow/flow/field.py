"""VelocityField: the one contract every network meets, image or robot.

Convention of the whole package: t = 0 noise, t = 1 data, velocity v = dx/dt = data - noise.
`dt = 0` asks for the instantaneous velocity, `dt = t_next - t > 0` for the average one over the
step (MeanFlow, Shortcut); a field that only knows the instantaneous one ignores dt.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch import Tensor

from rlflow.flow.path import expand
from rlflow.types import Cond, Tree

FEW_ROWS = 16
"""Rows of a network pass on the CPU are filled up to a multiple of this: matrix kernels for a few rows (up to 3 on one
maker's processors, 15 on another's) add in another order, and sampling 96 rows but scoring 7 would give a first ratio
of 1 + 1e-7 in place of exactly 1."""
FEW_TOKENS = 4
"""The same of a network of tokens, most of whose products have a row for each: layers.Linear fills up the few that do
not. Four samples have enough tokens, and no odd end of a vector."""


class VelocityField(nn.Module):
    """Base of all networks; subclasses set the attributes and override `encode` and `forward`."""

    args: dict[str, Any]
    """Constructor arguments as JSON values: a checkpoint rebuilds the network from them."""
    builder: str | None = None
    """module:function that takes `args`, where that is not the class."""
    own_format: bool = False
    """True where `save_weights` and `load_weights` say how the network is stored."""
    event_shape: tuple[int, ...]
    """Shape *D of one sample, without the row axis."""
    num_features: int
    """F, the width of Cond["pooled"]."""
    decodes_actions: bool = False
    """True where `decode` makes an environment's own actions of samples, in its units and number."""
    num_actions: int | None = None
    """Numbers of an action that an environment is given, where those behind them are padding."""
    uses_dt: bool = False
    """True when `forward` reads dt (an average-velocity field)."""
    has_instantaneous: bool = True
    """False for a flow map that has no dt = 0 branch."""
    has_spread: bool = False
    """True when `with_spread` tells how far data lie from where a step leads."""
    forgets_start: bool = False
    """True when the first step does not depend on x_0 (a Gaussian actor): its density is no part of the action's."""
    row_multiple: int = FEW_ROWS
    """What the rows of a pass on the CPU are filled up to a multiple of."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass, where the network supports it."""
    calls: int = 1
    """Network rows evaluated per row of one `forward` (2 under guidance)."""
    resolution: int | None = None
    """Pixels a side of the pictures, where `resize` can change it."""
    frames: int | None = None
    """Of the videos that `decode` makes; None of pictures and actions."""
    graph_calls: int = 1
    """Those of them that keep a graph where gradients are on."""
    constant_calls: int = 0
    """Those of them that gradients leave out: what they gave while sampling stands in for them at the same weights."""
    constant: Tensor | None = None
    """What they gave (N, *D) in the last call without a graph."""
    ragged: bool = False
    """True where a row's text is padded to the longest beside it: its velocity then depends on them by a rounding."""
    distilled: str | None = None
    """To what, where training distilled the network: it is then not the mean velocity of its samples."""
    first_time: float = 0.0
    """Where what the network knows begins; grids and draws of times start there, 0 is noise without any data."""
    begun_from: str = ""
    """What a person should know of the weights it began with: which, and as what they were read."""

    def tokenize(self, captions: list[str]) -> Tree:
        """Text to the tensors `encode` takes; only text-conditional fields have it."""
        raise NotImplementedError(f"{type(self).__name__} takes no text")

    def without_idle(self) -> AbstractContextManager[None]:
        """Inside, for passes without gradient under the weights in place: what adds nothing is not computed."""
        return nullcontext()

    def settle(self) -> None:
        """Every text of the run has been tokenised: do what is done once for all of them."""

    def encode(self, obs: Tree) -> Cond:
        """Raw observations (N, ...) to a Cond with at least "pooled" (N, F)."""
        raise NotImplementedError

    def observe(self, obs: Tree) -> None:
        """See the raw observations (N, ...) of a finished iteration; running statistics are updated here only."""

    def null(self, cond: Cond) -> Cond:
        """The unconditional version of `cond`, for guidance (N rows)."""
        raise NotImplementedError(f"{type(self).__name__} was not trained without a condition: use guidance scale 1")

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, *D) at x (N, *D), t (N,), dt (N,)."""
        raise NotImplementedError

    def with_spread(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """(N, D + 1): the velocity of `forward`, flat, and log s behind it, by one pass.

        s^2 = E[|x_1 - x_0 - v|^2 / D | x_t = x] is Var[x_1 | x_t] / (1 - t)^2, a mean over the event.
        """
        raise NotImplementedError(f"{type(self).__name__} has no spread head: build it with spread=True")

    def decode(self, x: Tensor) -> Tensor:
        """Sample (N, *D) to what an environment receives: images or videos (N, F, 3, H, W) in [0, 1]; actions."""
        return x

    def act(self, x: Tensor, cond: Cond) -> Tensor:
        """Sample (N, *D) made at `cond` to what is carried out; of a plan, the actions that follow it."""
        return self.decode(x)

    def times(self, num_steps: int) -> Tensor:
        """(K + 1,) float64 times the model's own sampler uses; what the grid `scheduler` asks for."""
        raise ValueError(f"{type(self).__name__} has no time grid of its own: use policy.grid=uniform")

    def lengths(self, v: Tensor) -> Tensor:
        """Of velocities (N, *D), as what divides them; guidance of some models keeps it (`CFGNorm`)."""
        return expand(v.flatten(1).norm(dim=1), v)

    def unscored(self, grid: Tensor) -> int:
        """Steps at the data end of a grid (K + 1,) that are too short to be scored on this model."""
        return 0

    def resize(self, resolution: int) -> None:
        """Make square pictures of another size from now on; ValueError where the model cannot."""
        raise ValueError(f"{type(self).__name__} makes pictures of one size: leave eval.resolution out")

    @property
    def unguided(self) -> VelocityField:
        """The field without any guidance wrapper."""
        return self

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Parameters that `encode` reads; when none of them trains, encodings are kept and reused."""
        return []

    def save_weights(self, folder: Path) -> None:
        """Write the weights into a folder, with `own_format`."""
        raise NotImplementedError

    def load_weights(self, folder: Path) -> None:
        """Inverse of `save_weights`; RuntimeError where names or shapes differ."""
        raise NotImplementedError


class Around(VelocityField):
    """Base of fields that change the velocity of another and are it in all else."""

    def __init__(self, field: VelocityField):
        super().__init__()
        self.field, self.num_features = field, field.num_features
        self.uses_dt, self.has_instantaneous = field.uses_dt, field.has_instantaneous
        self.calls, self.graph_calls, self.constant_calls = field.calls, field.graph_calls, field.constant_calls
        self.ragged, self.distilled, self.row_multiple = field.ragged, field.distilled, field.row_multiple
        self.first_time, self.frames = field.first_time, field.frames

    @property
    def event_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """As the inner field's."""
        return self.field.event_shape

    @property
    def resolution(self) -> int | None:  # type: ignore[override]
        """As the inner field's."""
        return self.field.resolution

    @property
    def grad_checkpointing(self) -> bool:
        """As the inner field's."""
        return self.field.grad_checkpointing

    @grad_checkpointing.setter
    def grad_checkpointing(self, on: bool) -> None:
        self.field.grad_checkpointing = on

    def tokenize(self, captions: list[str]) -> Tree:
        """As the inner field."""
        return self.field.tokenize(captions)

    def without_idle(self) -> AbstractContextManager[None]:
        """As the inner field."""
        return self.field.without_idle()

    def settle(self) -> None:
        """As the inner field."""
        self.field.settle()

    def encode(self, obs: Tree) -> Cond:
        """As the inner field."""
        return self.field.encode(obs)

    def observe(self, obs: Tree) -> None:
        """As the inner field."""
        self.field.observe(obs)

    def null(self, cond: Cond) -> Cond:
        """As the inner field."""
        return self.field.null(cond)

    def times(self, num_steps: int) -> Tensor:
        """As the inner field."""
        return self.field.times(num_steps)

    def lengths(self, v: Tensor) -> Tensor:
        """As the inner field."""
        return self.field.lengths(v)

    def unscored(self, grid: Tensor) -> int:
        """As the inner field."""
        return self.field.unscored(grid)

    def resize(self, resolution: int) -> None:
        """As the inner field."""
        self.field.resize(resolution)

    def decode(self, x: Tensor) -> Tensor:
        """As the inner field."""
        return self.field.decode(x)

    def act(self, x: Tensor, cond: Cond) -> Tensor:
        """As the inner field."""
        return self.field.act(x, cond)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """As the inner field."""
        return self.field.encoder_parameters()
