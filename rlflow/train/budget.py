"""What a run may spend, in iterations, minutes of training, or both: how much is done, and how long the rest takes."""

from __future__ import annotations

import math

from rlflow.report.glossary import duration


class Budget:
    """How much of a run is done: by iterations, by minutes, or whichever ends first."""

    def __init__(self, total_iterations: int | None, minutes: float | None):
        self.total_iterations, self.minutes = total_iterations, minutes

    def done(self, iteration: int, seconds: float) -> float:
        """Share in [0, 1]; nan without a budget."""
        shares = [iteration / self.total_iterations] if self.total_iterations else []
        shares += [seconds / (60 * self.minutes)] if self.minutes else []
        return min(1.0, max(shares)) if shares else math.nan

    def left(self, iteration: int, seconds: float) -> float:
        """Estimated seconds to the end; nan while it cannot be told."""
        ends = [60 * self.minutes - seconds] if self.minutes else []
        if self.total_iterations and iteration:
            ends.append(seconds / iteration * (self.total_iterations - iteration))
        return max(0.0, min(ends)) if ends else math.nan

    def place(self, iteration: int, seconds: float) -> str:
        """Where the run is, in words."""
        words = f"iteration {iteration}" + (f" of {self.total_iterations}" if self.total_iterations else "")
        if self.minutes:
            words += f", {seconds / 60:.1f} of {self.minutes:g} min trained"
        left = self.left(iteration, seconds)
        return words + (f", {duration(left)} left" if math.isfinite(left) else "")
