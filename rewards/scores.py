"""What a reward may return, and its scores as one tensor: real numbers, and nan where there is none.

Taken are None (no score at all), an array of real numbers (torch, NumPy, pandas, ...), a sequence of numbers or None.
What merely iterates or converts is refused: a dict would give its keys, a set any order, bytes their codes, "123" its
digits, a complex number its real part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Scores = Tensor | NDArray[Any] | Sequence[float | None]
"""(N,) numbers; None or nan where there is no score."""

TEXT = (str, bytes, bytearray, memoryview)
"""Sequences that are not of numbers."""


class SomeRows(Exception):
    """Raised by a reward that could score only some rows: carries their scores, nan elsewhere, and says why."""

    def __init__(self, scores: Scores, reason: str):
        super().__init__(reason)
        self.scores = scores


def as_scores(value: Scores | None, num_rows: int) -> Tensor:
    """(N,) float32 on the host, nan for None, nan and inf; ValueError says what was returned in place of N numbers."""
    if value is None:
        return torch.full((num_rows,), torch.nan)
    scores = _numbers(value, num_rows)
    if scores.shape != (num_rows,):
        raise _wrong(value, num_rows)
    return torch.where(scores.isfinite(), scores, torch.nan)


def scored(call: Callable[[], Scores | None], num_rows: int) -> tuple[Tensor, str | None]:
    """Scores (N,) of a call, and why some rows have none where it says so; raises what it raises, or as_scores."""
    try:
        value, reason = call(), None
    except SomeRows as some:
        value, reason = some.scores, str(some)
    return as_scores(value, num_rows), reason


def _numbers(value: Any, num_rows: int) -> Tensor:
    """float32 of whatever shape; ValueError for what holds anything but real numbers."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.layout is not torch.strided:
            raise _wrong(value, num_rows)
        return value.detach().to("cpu", torch.float32)
    if isinstance(value, Sequence) and not isinstance(value, TEXT):
        return torch.tensor([_number(v, i, value, num_rows) for i, v in enumerate(value)], dtype=torch.float32)
    array = np.asarray(value)
    if array.dtype == object and array.ndim == 1:  # numbers and None, as pandas keeps them
        return _numbers(array.tolist(), num_rows)
    if array.dtype.kind not in "buif" or isinstance(value, TEXT):
        raise _wrong(value, num_rows)
    with np.errstate(over="ignore"):  # too large is inf, which is no score
        return torch.from_numpy(array.astype(np.float32))


def _number(value: Any, row: int, whole: Any, num_rows: int) -> float:
    """One element of a sequence; an array of one number counts where it has no axis."""
    if value is None:
        return math.nan
    if isinstance(value, Real | np.bool_):
        return float(value)
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0 and isinstance(value.item(), Real):
        return float(value)
    raise _wrong(whole, num_rows, f", whose element {row} is {_described(value)}")


def _wrong(value: Any, num_rows: int, element: str = "") -> ValueError:
    must = f"must be real numbers or None in shape ({num_rows},)"
    return ValueError(f"returned {_described(value)}{element} for {num_rows} rows, {must}")


def _described(value: Any) -> str:
    """What it is, in few words: arrays and sequences with their shape, small things as they are written."""
    name = type(value).__name__
    if isinstance(value, Tensor | np.ndarray):
        return f"{name} of shape {tuple(value.shape)} and {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Sequence) and not isinstance(value, TEXT):
        return f"{name} of shape {_shape(value)}"
    return f"{name} {value!r}" if isinstance(value, Real | complex | str) and len(repr(value)) < 40 else name


def _shape(value: Any) -> tuple[int, ...]:
    """The lengths of nested sequences, as deep as all elements agree."""
    if isinstance(value, Tensor | np.ndarray):
        return tuple(value.shape)
    if not isinstance(value, Sequence) or isinstance(value, TEXT):
        return ()
    inner = {_shape(v) for v in value}
    return (len(value), *(inner.pop() if len(inner) == 1 else ()))
