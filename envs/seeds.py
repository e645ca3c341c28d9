"""Random numbers from seeds: hashes of (seed, counter), so no row owns a generator and no device is waited for.

SplitMix64 (Steele, Lea and Flood, 2014) in the wrapping arithmetic of int64: draw k of a seed is mix(seed + k golden).
Training has the seeds below 2^40, evaluation those from there on: see `first_seed` and `evaluation_seeds`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Ints = TypeVar("Ints", Tensor, np.ndarray[Any, np.dtype[np.int64]])
"""Whole numbers of 64 bits: a tensor, or on the CPU an array, whose small operations cost a third."""

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the odd number nearest 2^64 / golden ratio, as int64
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
TRAINING = 2**40  # seeds of training; evaluation's begin here
STRIDE = 0x9E3779B97F  # the odd number nearest 2^40 / golden ratio
EPISODES = 0x2545F4914F6CDD1D  # keeps the seeds of episodes apart from the draws of their first


def first_seed(run: int) -> int:
    """Where a training run with this train.seed begins to count its groups, upwards and modulo 2^40.

    Steps of the golden ratio leave the widest gaps: runs whose train.seed differ by d <= 2^20 have no number in common
    before one of them has used 2^40 / 3d, three hundred million for d = 1000.
    """
    return run * STRIDE % TRAINING


def evaluation_seeds(run: int, num: int) -> Tensor:
    """(num,) seeds of the episodes that a run with this eval.seed is judged by; num <= 2^20."""
    return TRAINING + run % 2**20 * 2**20 + torch.arange(num)


def mix(x: Ints) -> Ints:
    """A bijection of int64 that changes half of the bits whenever one input bit changes."""
    for shift, factor in ROUNDS:
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))


def narrow(seeds: Tensor) -> Tensor:
    """Seeds of 31 bits, for who takes no longer ones: those as they are, and hashes of the others.

    Remainders would give the seeds of evaluation, which start at a power of two, those of training.
    """
    return torch.where((seeds >= 0) & (seeds < 2**31), seeds, mix(seeds) & (2**31 - 1))


def uniform(seeds: Tensor, num: int) -> Tensor:
    """(B, num) float64 in [0, 1), row b a function of seeds[b] only."""
    if seeds.device.type == "cpu":
        counter = np.arange(1, num + 1) * GOLDEN
        return torch.from_numpy(_fraction(mix(seeds.numpy()[:, None] + counter)).astype(np.float64) * 2.0**-53)
    bits = mix(seeds.unsqueeze(1) + torch.arange(1, num + 1, device=seeds.device) * GOLDEN)
    return _fraction(bits).double() * 2.0**-53


def _fraction(bits: Ints) -> Ints:
    """The upper 53 of 64 bits, a double's."""
    return (bits >> 11) & (2**53 - 1)


def normal(seeds: Tensor, num: int) -> Tensor:
    """(B, num) float64 standard normal numbers (Box and Muller, 1958), row b a function of seeds[b] only."""
    u = uniform(seeds, 2 * num)
    return (-2 * torch.log1p(-u[:, :num])).sqrt() * torch.cos(2 * math.pi * u[:, num:])


def episode_seeds(first: Ints, episode: Ints) -> Ints:
    """(B,) seed of each row's episode: `first` for episode 0, then hashes of (first, episode) below 2^40."""
    later = mix((first ^ EPISODES) + episode * GOLDEN) & (TRAINING - 1)
    return first + (later - first) * (episode != 0)


@contextmanager
def numpy_seed(seed: int | None) -> Iterator[None]:
    """NumPy's global generator from `seed` (below 2^64) inside, and after as it was before; None: left alone."""
    if seed is None:
        yield
        return
    before = np.random.get_state()
    np.random.seed(seed if seed < 2**32 else [seed % 2**32, seed >> 32])
    try:
        yield
    finally:
        np.random.set_state(before)
