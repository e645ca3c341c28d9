"""Pairs: the samples of two evaluations that were asked the same thing, and every difference that is made of them.

A sample's key is a hash of all that was asked: its row of the prompt table or its simulator, the seed and its number.
Two evaluations are paired, key by key in whatever order, where both have the same keys. Those of earlier versions kept
caption numbers only: they are paired where these are equal row by row.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlflow.report.stats import Interval, paired_bootstrap

if TYPE_CHECKING:
    from torch import Tensor

KEY, CAPTION = "key", "caption_id"
Array = NDArray[Any]
Scores = Mapping[str, Array]
"""Of the N samples of an evaluation by metric (N,), with `key` and `caption_id` (N,)."""
NOT_KEPT = "the scores of single samples were not kept"


class Paired(NamedTuple):
    """A paired difference; nan where `reason` says why there is none."""

    difference: Interval
    reason: str | None = None
    num_rows: int = 0
    num_prompts: int = 0


def sample_keys(asked: Iterable[Any]) -> NDArray[np.int64]:
    """(N,) int64 keys of what each sample was asked, JSON-able values."""
    texts = (json.dumps(row, sort_keys=True, default=str) for row in asked)
    sums = (hashlib.sha256(text.encode()).digest()[:8] for text in texts)
    return np.array([int.from_bytes(first, "big", signed=True) for first in sums], dtype=np.int64)


def kept(scores: Mapping[str, Tensor], caption_id: Tensor, key: Tensor | None) -> dict[str, Tensor]:
    """What is kept of an evaluation to be paired later."""
    return {**scores, CAPTION: caption_id, **({} if key is None else {KEY: key})}


def pair(a: Scores, b: Scores, metric: str, settings: Iterable[str] = ()) -> Paired:
    """Mean of b - a over their pairs. `settings` differ between the two: that decides where there are no keys."""
    nothing = Interval(math.nan, math.nan, math.nan)
    if (reason := unlike(a, b, settings)) is not None:
        return Paired(nothing, reason)
    if metric not in a or metric not in b:
        return Paired(nothing, NOT_KEPT)
    ids = a[CAPTION]
    difference = paired_bootstrap(a[metric], b[metric][_order(a, b)], ids)
    return Paired(difference, None, len(ids), len(np.unique(ids)))


def unlike(a: Scores, b: Scores, settings: Iterable[str] = ()) -> str | None:
    """Why the samples of two evaluations cannot be paired; None where they can."""
    if KEY in a and KEY in b:
        same = np.array_equal(np.sort(a[KEY]), np.sort(b[KEY]))
        return None if same else "other samples were evaluated"
    if differ := list(settings):
        return "evaluated with another " + ", ".join(differ)
    if CAPTION not in a or CAPTION not in b:
        return NOT_KEPT
    same = np.array_equal(a[CAPTION], b[CAPTION])
    return None if same else "the prompts differ"


def _order(a: Scores, b: Scores) -> Array:
    """(N,) rows of b in the order of a."""
    if KEY not in a or KEY not in b:
        return np.arange(len(a[CAPTION]))
    return b[KEY].argsort()[a[KEY].argsort().argsort()]
