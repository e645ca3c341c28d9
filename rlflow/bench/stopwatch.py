"""A stopwatch for benchmarks: samples by name in wall and CPU seconds, and ratios of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Seconds:
    """One run by the wall clock, and in CPU time of all threads of the process."""

    wall: float
    cpu: float


class Times:
    """Samples by name, and their ratios."""

    def __init__(self) -> None:
        self.samples: dict[str, list[Seconds]] = {}

    def run(self, name: str, fn: Callable[[int], object], iteration: int) -> None:
        """Time one call."""
        wall, cpu = time.perf_counter(), time.process_time()
        fn(iteration)
        sample = Seconds(time.perf_counter() - wall, time.process_time() - cpu)
        self.samples.setdefault(name, []).append(sample)

    def median(self, name: str, clock: str = "wall") -> float:
        """Seconds of the middle sample."""
        return statistics.median(getattr(s, clock) for s in self.samples[name])

    def ratio(self, name: str, other: str, average: Callable[[list[float]], float], clock: str = "wall") -> float:
        """`average` of the samples of one over that of the other."""
        a, b = ([getattr(s, clock) for s in self.samples[n]] for n in (name, other))
        return average(a) / average(b)


class Phases:
    """Wall seconds by phase; inside one phase the calls of another are its own."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._busy = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside to `name`, unless a phase is running already."""
        if self._busy:
            yield
            return
        self._busy, begin = True, time.perf_counter()
        try:
            yield
        finally:
            self._busy = False
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def listen(self, owner: object, method: str, name: str) -> None:
        """Count every call of a method of `owner` to phase `name`."""
        call = getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return call(*args, **kwargs)

        setattr(owner, method, counted)

    def shares(self, total: float) -> dict[str, float]:
        """Of `total` seconds, with the rest as "other"."""
        return {n: s / total for n, s in self.seconds.items()} | {"other": 1 - sum(self.seconds.values()) / total}


@contextmanager
def num_threads(number: int | None) -> Iterator[None]:
    """Inside, PyTorch has so many; None leaves what there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
