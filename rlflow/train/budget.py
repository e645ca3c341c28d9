"""What a run may spend, in iterations, minutes of training, or both: how much is done, how long the rest takes, and how
many images or environment steps it comes to."""

from __future__ import annotations

import math
from typing import NamedTuple

from rlflow import registry
from rlflow.config.schema import Config
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


class Planned(NamedTuple):
    """How many images a run makes, or primitive steps it takes; `most` where episodes may end before they are taken."""

    num: int
    of: str
    most: bool

    def words(self, runs: int = 1) -> str:
        """at most 32,000 environment steps"""
        return f"{'at most ' if self.most else ''}{runs * self.num:,} {self.of}"


def planned(config: Config, trust_code: bool = False) -> Planned | None:
    """Groups x horizon x chunk x iterations, before anything runs; None without a number of iterations or a horizon."""
    c, iterations = config.env, config.train.iterations
    rows = c.num_groups * c.group_size * (iterations or 0)
    early = config.train.minutes is not None or bool(config.train.stop_when)
    if c.name == "prompt":
        return Planned(rows, "images", early) if iterations else None
    if not iterations or c.horizon is None:
        return None
    chunk = _chunk(config, trust_code)
    return Planned(rows * c.horizon * chunk, "environment steps", early or chunk > 1 or c.mode == "episodes")


def _chunk(config: Config, trust_code: bool) -> int:
    """Primitive steps of a decision: the setting of that name; without one, what a row that is made here takes."""
    env, given = config.env, config.env.settings
    setting = registry.settings(registry.find("env", env.name, trust_code)).get("chunk")
    if setting is not None:
        return int(given.get("chunk", setting.default))
    try:
        supplied = {"num_envs": 1, "gamma": env.gamma}
        made = registry.build("env", "env.settings", given | {"name": env.name}, supplied, trust_code)
    except (ValueError, ImportError):  # an extra that is not installed here
        return 1
    return int(made.action_shape[0]) if len(made.action_shape) > 1 else 1
