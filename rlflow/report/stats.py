"""Confidence intervals by the percentile bootstrap over clusters (Efron and Tibshirani 1993, chapter 13).

Rows that share a caption are not independent, so whole captions are drawn with replacement. With s_c the sum
and n_c the number of rows of caption c, one replicate is sum_c w_c s_c / sum_c w_c n_c, w ~ multinomial.
Rows without a score (nan) take no part, in a paired comparison neither does their partner.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK = 4_000_000  # multinomial weights held at once


class Interval(NamedTuple):
    """An estimate and its confidence interval; the bounds are nan where fewer than two clusters have a score."""

    value: float
    low: float
    high: float


def paired_bootstrap(
    before: ArrayLike,
    after: ArrayLike,
    cluster: ArrayLike,
    num: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of after - before with its interval; all three are (N,), row i of both is the same caption and noise."""
    before, after = _floats("before", before), _floats("after", after)
    if before.shape != after.shape:
        raise ValueError(f"before has {before.size} rows and after {after.size}: a paired test needs the same rows")
    return bootstrap_mean(after - before, cluster, num, seed, level)


def bootstrap_mean(
    values: ArrayLike,
    cluster: ArrayLike | None = None,
    num: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of `values` (N,) with its interval; without `cluster` (N,) every row is its own cluster."""
    values = _floats("values", values)
    ids = np.arange(values.size) if cluster is None else np.asarray(cluster)
    if ids.shape != values.shape:
        raise ValueError(f"cluster has shape {ids.shape} and the values {values.shape}: give one id per row")
    kept = np.isfinite(values)
    if not kept.any():
        return Interval(math.nan, math.nan, math.nan)
    _, place = np.unique(ids[kept], return_inverse=True)
    sums = np.bincount(place, values[kept]).astype(np.float64)
    counts = np.bincount(place)
    mean = float(sums.sum() / counts.sum())
    if counts.size < 2:
        return Interval(mean, math.nan, math.nan)
    tail = (1 - level) / 2
    low, high = np.quantile(_replicates(sums, counts, num, seed), [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def _replicates(sums: NDArray[np.float64], counts: NDArray[np.intp], num: int, seed: int) -> NDArray[np.float64]:
    """(num,) means of clusters drawn with replacement."""
    rng, size = np.random.default_rng(seed), counts.size
    even = np.full(size, 1 / size)
    parts = []
    for start in range(0, num, step := max(1, CHUNK // size)):
        weight = rng.multinomial(size, even, size=min(step, num - start))
        parts.append(weight @ sums / (weight @ counts))
    return np.concatenate(parts)


def _floats(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}: expected one number per row, (N,)")
    return array
