"""What the rows of a simulator are counted with: NumPy on the CPU, where a small operation costs a third, else PyTorch.

On a device nothing is asked that the host would have to wait for, so a mask of no row is a mask like any other there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlflow.types import Tree, tree_where

Rows = Any
"""One number for each of B rows: a tensor (B,), or on the CPU an array (B,)."""


@dataclass(frozen=True)
class Arithmetic:
    """The operations that differ."""

    array: Callable[[Any], Any]  # a tensor, or an array on the CPU, as it is counted with; of the same memory
    tensor: Callable[[Any], Tensor]  # the way back
    floats: Callable[[Rows], Tensor]  # float32, of memory of their own
    action: Callable[[Tensor, Any], Any]  # a caller's actions as the second argument's kind
    where: Callable[..., Rows]
    fmax: Callable[[Rows, Rows], Rows]
    some: Callable[[Rows], Rows | None]  # a mask; None where it is known to have no row


def _array(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) else value.numpy()


def _action(action: Tensor, like: Any) -> Any:
    try:
        return action.numpy()
    except (TypeError, RuntimeError):  # of another device, of a dtype that NumPy has not, or with a graph
        return action.detach().to("cpu", torch.float32).numpy()


ON_CPU = Arithmetic(
    _array,
    torch.from_numpy,
    lambda rows: torch.from_numpy(rows.astype(np.float32)),
    _action,
    np.where,
    np.fmax,
    lambda mask: mask if np.count_nonzero(mask) else None,
)
ON_DEVICE = Arithmetic(
    lambda value: value,
    lambda value: value,
    lambda rows: rows.to(torch.float32, copy=True),
    lambda action, like: action.detach().to(like),
    torch.where,
    torch.fmax,
    lambda mask: mask,
)


def as_tensors(tree: Tree) -> Tree:
    """The arrays of a tree as tensors of the same memory; what else there is as it is."""
    if isinstance(tree, dict):
        return {name: as_tensors(part) for name, part in tree.items()}
    return torch.from_numpy(tree) if isinstance(tree, np.ndarray) else tree


def renewed(mask: Rows, fresh: Tree, tree: Tree) -> Tree:
    """`tree`, of memory of its own that may be written to, with the rows of `mask` (B,) as in `fresh`."""
    if isinstance(fresh, dict):
        return {name: renewed(mask, part, tree[name]) for name, part in fresh.items()}
    if isinstance(fresh, np.ndarray):
        np.copyto(tree.numpy(), fresh, where=mask.reshape(-1, *[1] * (fresh.ndim - 1)))
        return tree
    return tree_where(torch.as_tensor(mask), fresh, tree)


def copied(tree: Tree) -> Tree:
    """Tensors of memory of their own, of tensors and arrays."""
    if isinstance(tree, np.ndarray):
        return torch.from_numpy(tree.copy())
    return {name: copied(part) for name, part in tree.items()} if isinstance(tree, dict) else tree.clone()
