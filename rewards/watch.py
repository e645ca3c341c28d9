"""Notice a reward that changes in place what the next one reads, at the price of no copy.

On the host the bytes are what counts (crc32: a tensor's memory can be written through NumPy too); elsewhere torch's
own counter of writes, for reading a card's memory would make everything wait for it.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def own(columns: Mapping[str, Any], names: tuple[str, ...], copy_tensors: bool) -> dict[str, Any]:
    """The columns `names` for one reward: lists, which are small, as copies, tensors only where it is asked for."""
    return {n: v.clone() if copy_tensors else v for n, v in _tensors(columns, names).items()} | {
        n: copy.deepcopy(columns[n]) for n in names if not isinstance(columns[n], Tensor)
    }


class Watch:
    """Remembers what the tensors among `columns` hold."""

    def __init__(self, columns: Mapping[str, Any]):
        self.tensors = _tensors(columns, tuple(columns))
        self.marks = {name: _mark(value) for name, value in self.tensors.items()}

    def changed(self) -> list[str]:
        """Names of the columns that hold something else by now."""
        return [name for name, value in self.tensors.items() if _mark(value) != self.marks[name]]


def _tensors(columns: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: columns[name] for name in names if isinstance(columns[name], Tensor)}


def _mark(value: Tensor) -> int:
    if value.device.type == "cpu":
        return zlib.crc32(value.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return 0 if value.is_inference() else value._version  # one of inference mode cannot be written to elsewhere
