"""Remember what was computed from the last few batches of images, so that two rewards share one detection."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rlflow.rewards.base import to_uint8

T = TypeVar("T")


class BatchMemory(Generic[T]):
    """`fn` of the 8-bit pixels (N, H, W, 3), kept for the last `size` batches by content; thread-safe."""

    def __init__(self, fn: Callable[[NDArray[np.uint8]], T], size: int = 4) -> None:
        self.fn, self.size = fn, size
        self.calls = 0
        self._kept: OrderedDict[tuple[bytes, tuple[int, ...]], T] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, images: Tensor) -> T:
        """fn(to_uint8(images)) for images (N, 3, H, W) in [0, 1]; callers must not change what they get."""
        pixels = to_uint8(images)
        key = (hashlib.blake2b(pixels.data).digest(), pixels.shape)
        with self._lock:  # held while computing: a second thread waits instead of computing it too
            if key not in self._kept:
                self._kept[key] = self.fn(pixels)
                self.calls += 1
            self._kept.move_to_end(key)
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
            return self._kept[key]
