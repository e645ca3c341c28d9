"""Latents as tokens: 2 x 2 of them side by side, channels outermost, as FLUX.1 and Qwen-Image read them."""

from __future__ import annotations

from torch import Tensor

SIDE = 2
"""Latents a side of a token."""


def pack(x: Tensor) -> Tensor:
    """(N, C, H, W) to tokens (N, H/2 W/2, 4 C)."""
    return x.unflatten(3, (-1, SIDE)).unflatten(2, (-1, SIDE)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `pack`, of tokens in so many rows and columns."""
    patches = tokens.unflatten(2, (-1, SIDE, SIDE)).unflatten(1, (rows, columns))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
