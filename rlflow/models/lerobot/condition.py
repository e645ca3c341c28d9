"""What a LeRobot policy denoises under, taken apart into tensors that lead with rows, and put together again.

A policy hands `euler_integrate` a closure v(x, s). What that closure holds (a cache of keys and values, masks, a state,
positions) is its condition; the same code over the rows of other observations is the same function of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.functional import layer_norm

from rlflow.types import Cond

Rebuild = Callable[[Cond], Any]
Axes = Mapping[str, int | None]
"""Where a tensor of the condition has its rows, by name; None: nowhere, all rows share it."""
SHARED = (bool, int, float, str, slice, nn.Module, FunctionType, torch.dtype, torch.device, type(None))
"""What is the same for all rows."""
MASKS = ("prefix_pad_masks", "attention_mask")


def cells(fn: FunctionType) -> dict[str, Any]:
    """What a function holds besides its arguments, by name."""
    return {n: c.cell_contents for n, c in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)}


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a condition by name; ValueError for what may hold rows and cannot be looked into."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, SHARED):
        return {}
    found: dict[str, Tensor] = {}
    for key, part in _parts(value, name).items():
        found |= tensors(part, f"{name}.{key}" if name else str(key))
    return found


def _parts(value: Any, name: str) -> dict[Any, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if hasattr(value, "layers"):  # transformers' caches
        return {i: {"keys": layer.keys, "values": layer.values} for i, layer in enumerate(value.layers)}
    raise ValueError(f"the policy denoises under a {type(value).__name__} ({name}), which cannot be taken apart")


def axes_of(few: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, int | None]:
    """The axes of rows, from the conditions of two numbers of rows."""
    found: dict[str, int | None] = {}
    for name, value in few.items():
        differ = [i for i, (a, b) in enumerate(zip(value.shape, more[name].shape, strict=True)) if a != b]
        if len(differ) > 1:
            raise ValueError(f"the policy denoises under {name} {tuple(value.shape)}, of which no axis is that of rows")
        found[name] = differ[0] if differ else None
    return found


def take_apart(value: Any, name: str, axes: Axes, parts: dict[str, Tensor]) -> Rebuild:
    """Put the tensors of a condition into `parts`, rows first; returns what makes the like of it from a Cond.

    A cache is made anew at every call, for a step of the policy may append to it, and so is a tensor, which a step
    may write into.
    """
    if isinstance(value, Tensor):
        axis = axes[name]
        if axis is None:
            return lambda cond: value
        parts[name] = value.movedim(
            axis, 0
        ).contiguous()  # as rows taken from it are, or products would round otherwise
        return lambda cond: (cond[name] if cond.rows is not None else cond[name].clone()).movedim(0, axis)
    if isinstance(value, SHARED):
        return lambda cond: value
    inner = {k: take_apart(v, f"{name}.{k}" if name else str(k), axes, parts) for k, v in _parts(value, name).items()}
    if isinstance(value, dict):
        return lambda cond: {k: rebuild(cond) for k, rebuild in inner.items()}
    if isinstance(value, list | tuple):
        return lambda cond: type(value)(rebuild(cond) for rebuild in inner.values())
    return lambda cond: _cache(value, [rebuild(cond) for rebuild in inner.values()])


def again(fn: FunctionType, held: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The code of a function over other contents of its cells."""
    closure = tuple(CellType(held[name]) for name in fn.__code__.co_freevars)
    return FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, closure)


def _cache(like: Any, layers: list[dict[str, Tensor]]) -> Any:
    """A cache like another one, with its own keys and values."""
    made = copy.copy(like)
    made.layers = [copy.copy(layer) for layer in like.layers]
    for layer, kept in zip(made.layers, layers, strict=True):
        layer.keys, layer.values = kept["keys"], kept["values"]
    return made


def pooled(parts: Mapping[str, Tensor], state: Tensor | None = None) -> Tensor:
    """(N, F) for small networks: the mean of the last values over valid tokens, normalised, and the state.

    Values are (N, L, heads, d) or (N, heads, L, d). Their mean by itself is small, and a state that the prefix has as
    one token of hundreds is lost in it.
    """
    last = [v for name, v in parts.items() if "value" in name.rpartition(".")[2]][-1]
    mask = next((parts[name] for name in MASKS if name in parts), None)
    by_heads = last.shape[1] not in (() if mask is None else (mask.shape[1],))
    tokens = (last.transpose(1, 2) if by_heads else last).flatten(2).float()
    weight = tokens.new_ones(tokens.shape[:2]) if mask is None else mask[:, : tokens.shape[1]].to(tokens)
    mean = (tokens * weight.unsqueeze(-1)).sum(1) / weight.sum(1, keepdim=True)
    mean = layer_norm(mean, mean.shape[1:], eps=1e-12)
    return mean if state is None else torch.cat([mean, state.flatten(1).to(mean)], 1)
