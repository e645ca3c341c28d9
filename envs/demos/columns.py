"""The columns of an episode: what is written of them, and what they must be to be learnt from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def column(value: Any) -> Tensor:
    """A tensor: real numbers and flags as float32, whole ones as they are."""
    tensor = torch.as_tensor(value)
    return tensor.float() if tensor.is_floating_point() or tensor.dtype == torch.bool else tensor


def check_like(columns: dict[str, Tensor], like: dict[str, Tensor], bound: float | None) -> None:
    """ValueError unless the columns of an episode have one length and finite numbers, and are like those of `like`."""
    if columns["reward"].ndim != 1 or not len(columns["reward"]):
        raise ValueError(f"reward has shape {tuple(columns['reward'].shape)}, it must be (L,) with L >= 1")
    lengths = {name: len(value) if value.ndim else 0 for name, value in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"its columns have lengths {lengths}: row i is what was seen, done then, and earned")
    kinds, others = ({n: (tuple(v.shape[1:]), v.dtype) for n, v in c.items()} for c in (columns, like))
    if kinds != others:
        raise ValueError(f"its rows are {kinds}, those of the first episode {others}")
    for name, value in columns.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} is not finite in step {int((~value.isfinite()).nonzero()[0, 0])}")
    largest = float(columns["action"].abs().max())
    if bound is not None and largest > bound * (1 + 1e-4):
        raise ValueError(
            f"actions go up to {largest:g} and the environment takes them in [-{bound:g}, {bound:g}], stretched to its "
            "own bounds: give 2 (action - low) / (high - low) - 1, or bound=None where it has no bounds"
        )


def numbers(columns: dict[str, Tensor]) -> Tensor:
    """What vector policies read: all observations but pixels, side by side in the order of their names (n, D)."""
    names = sorted(n for n, v in columns.items() if n.startswith("obs") and v.dtype != torch.uint8)
    return torch.cat([columns[n].flatten(1) for n in names] or [torch.zeros(len(columns["action"]), 0)], 1)
