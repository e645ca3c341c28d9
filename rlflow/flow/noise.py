"""Reproducible Gaussian noise: a pure function of (key, row), independent of batching and world size.

Rows are drawn in blocks whose size depends only on the event: a block of one row where an event is
large (an image), a few hundred where it is small (a robot action; a Generator per robot sample costs
a hundred times the draw). Equal keys give equal noise on the same device type only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_NUMBERS = 4096


class Key(NamedTuple):
    """Names one draw; every field takes part in the seed."""

    seed: int
    purpose: str
    iteration: int = 0
    outer: int = 0
    k: int = 0


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts (blake2b, so near keys are unrelated)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A Generator seeded by `derive_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def noise(
    key: Key,
    row_ids: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal (N, *shape) for the global rows `row_ids` (N,), a CPU long tensor (no host sync)."""
    if not len(row_ids):
        return torch.empty((0, *shape), dtype=dtype, device=device)
    block, first, num = max(1, BLOCK_NUMBERS // max(1, math.prod(shape))), int(row_ids[0]), len(row_ids)

    def drawn(blocks: Iterable[int]) -> Tensor:
        seeded = [generator(*key, b, device=device) for b in blocks]
        return torch.cat([torch.randn((block, *shape), generator=g, dtype=dtype, device=device) for g in seeded])

    if torch.equal(row_ids, torch.arange(first, first + num)):  # the rows of a rank: nothing to send to the device
        return drawn(range(first // block, (first + num - 1) // block + 1))[first % block :][:num]
    blocks, place = (row_ids // block).unique(return_inverse=True)
    return drawn(blocks.tolist())[(place * block + row_ids % block).to(device, non_blocking=True)]
