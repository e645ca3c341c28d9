"""What several tasks say together where there are few seeds (Agarwal et al. 2021, arXiv:2108.13264).

Of tasks m with scores x_m,i of n_m seeds: a replicate of the stratified bootstrap draws n_m of the seeds of each task
with replacement; tasks are never drawn, for they are what is asked and no sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlflow.report.stats import Interval

Floats = NDArray[np.float64]


def iqm(scores: Sequence[ArrayLike]) -> float:
    """Interquartile mean: of all scores of all tasks, each (n_m,), the mean without the lowest and highest quarter."""
    return float(_iqm([_floats("scores", s)[None] for s in scores])[0])


def _iqm(scores: Sequence[Floats]) -> Floats:
    """(R,) of R replicates, each task's (R, n_m)."""
    every = np.sort(np.concatenate(scores, 1), 1)
    cut = every.shape[1] // 4
    middle: Floats = every[:, cut : every.shape[1] - cut].mean(1)
    return middle


def improvement(x: Sequence[ArrayLike], y: Sequence[ArrayLike]) -> float:
    """Probability that a run of x beats one of y, equals counting half, on a task drawn at random; (n_m,) each."""
    pairs = zip(x, y, strict=True)
    return float(_improvement([(_floats("x", a)[None], _floats("y", b)[None]) for a, b in pairs])[0])


def _improvement(pairs: Sequence[tuple[Floats, Floats]]) -> Floats:
    """(R,), of tasks' (R, n_m) and (R, k_m)."""
    won = [0.5 + 0.5 * np.sign(x[:, :, None] - y[:, None, :]).mean((1, 2)) for x, y in pairs]
    mean: Floats = np.mean(won, 0)
    return mean


def profile(scores: Sequence[ArrayLike], above: ArrayLike) -> Floats:
    """Performance profile (T,): the share of runs with a score above each of (T,) thresholds, tasks counting alike."""
    limits = _floats("above", above)
    shares = [(_floats("scores", s)[:, None] > limits).mean(0) for s in scores]
    mean: Floats = np.mean(shares, 0)
    return mean


def profile_band(
    scores: Sequence[ArrayLike], above: ArrayLike, num: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[Floats, Floats] | None:
    """Pointwise bounds (T,) of `profile` by the stratified bootstrap; None where no task has two seeds."""
    tasks, limits, rng = [_floats("scores", s) for s in scores], _floats("above", above), np.random.default_rng(seed)
    if max(map(len, tasks)) < 2:
        return None
    shares = np.mean([(_drawn(s, num, rng)[:, :, None] > limits).mean(1) for s in tasks], 0)
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def iqm_interval(scores: Sequence[ArrayLike], num: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """`iqm` with its interval by the stratified bootstrap."""
    tasks = [_floats("scores", s) for s in scores]
    return _stratified(iqm(tasks), lambda rng: _iqm([_drawn(s, num, rng) for s in tasks]), tasks, seed, level)


def improvement_interval(
    x: Sequence[ArrayLike], y: Sequence[ArrayLike], num: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """`improvement` with its interval; seeds of x and y are drawn apart."""
    pairs = [(_floats("x", a), _floats("y", b)) for a, b in zip(x, y, strict=True)]

    def replicates(rng: np.random.Generator) -> Floats:
        return _improvement([(_drawn(a, num, rng), _drawn(b, num, rng)) for a, b in pairs])

    return _stratified(improvement(x, y), replicates, [s for pair in pairs for s in pair], seed, level)


def _drawn(scores: Floats, num: int, rng: np.random.Generator) -> Floats:
    """(num, n) scores (n,) drawn with replacement."""
    drawn: Floats = scores[rng.integers(len(scores), size=(num, len(scores)))]
    return drawn


def _stratified(
    value: float,
    replicates: Callable[[np.random.Generator], Floats],
    tasks: Sequence[Floats],
    seed: int,
    level: float,
) -> Interval:
    """The bounds are nan where no task has two seeds: then every replicate is the same."""
    if max(map(len, tasks)) < 2:
        return Interval(value, math.nan, math.nan)
    tail = (1 - level) / 2
    low, high = np.quantile(replicates(np.random.default_rng(seed)), [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def _floats(name: str, values: ArrayLike) -> Floats:
    array: Floats = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} has shape {array.shape}: expected one number per run of a task, (n,), n > 0")
    return array
