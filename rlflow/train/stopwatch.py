"""A stopwatch for benchmarks: samples by name in wall and CPU seconds, and ratios of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Seconds:
    """One run by the wall clock, and in CPU time of all threads of the process."""

    wall: float
    cpu: float


class Times:
    """Samples by name, and their ratios."""

    def __init__(self) -> None:
        self.samples: dict[str, list[Seconds]] = {}

    def run(self, name: str, fn: Callable[[int], None], iteration: int) -> None:
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
