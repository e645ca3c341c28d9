"""Reproducible Gaussian noise: a pure function of (key, row), independent of batching and world size.

Rows are drawn in blocks whose size depends only on the event: a block of one row where an event is
large (an image), a few hundred where it is small (a robot action; a Generator per robot sample costs
a hundred times the draw). Equal keys give equal noise on the same device type only.
"""

from __future__ import annotations

import hashlib
import math
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
    block = max(1, BLOCK_NUMBERS // max(1, math.prod(shape)))
    if block > 1 and len(row_ids) and (only := int(row_ids.min()) // block) == int(row_ids.max()) // block:
        g = generator(*key, only, device=device)  # all in one block, as most batches of robots
        drawn_once = torch.randn((block, *shape), generator=g, dtype=dtype, device=device)
        return drawn_once[(row_ids - only * block).to(device)]
    owner = (row_ids // block).tolist()
    offset = row_ids % block
    drawn = {}
    for b in owner:
        if b not in drawn:
            g = generator(*key, b, device=device)
            drawn[b] = torch.randn((block, *shape), generator=g, dtype=dtype, device=device)
    if not owner:
        return torch.empty((0, *shape), dtype=dtype, device=device)
    if block == 1:
        return torch.cat([drawn[b] for b in owner])
    place = {b: i for i, b in enumerate(drawn)}
    index = torch.tensor([place[b] for b in owner]) * block + offset
    return torch.cat(list(drawn.values()))[index.to(device)]
