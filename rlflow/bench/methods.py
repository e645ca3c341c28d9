"""Methods that choose the noisy steps of a chain, and the network passes of an iteration of each, by count.

Cost is counted in forward-equivalents of one row: a forward is 1, a forward with its backward 3. With K steps, of
which R are scored, a row costs K + 3 R.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from rlflow.flow.steps import Plan
from rlflow.registry import build

SKIP_LAST = 2  # MixGRPO's window slides over the first K - 2 steps


@dataclass(frozen=True)
class Method:
    """A way to choose the noisy steps; `aim` is the largest share of a Flow-GRPO iteration it may take."""

    name: str
    steps: dict[str, Any]
    solver: str = "euler"
    shared_noise: bool = False
    aim: float | None = None
    slides: bool = True


def methods(window: int) -> list[Method]:
    """Flow-GRPO first, then what is measured against it."""
    slide = {"name": "window", "size": window, "every": 1, "stride": 1, "skip_last": SKIP_LAST}
    flash, frozen = slide | {"compress": 0.4}, slide | {"compress": 0.2, "stride": 0}
    return [
        Method("flow_grpo", {"name": "all_but_last"}, slides=False),
        Method("mixgrpo", slide, aim=0.42),
        Method("flash", flash, "dpm2m", aim=0.36),
        Method("flash_star", frozen, "dpm2m", aim=0.25, slides=False),
        Method("mixgrpo_shared_noise", slide, shared_noise=True),
        Method("flash_shared_noise", flash, "dpm2m", shared_noise=True),
    ]


def forward_equivalents(plan: Plan, group_size: int = 1, shared_noise: bool = False) -> float:
    """Network passes per row of one iteration, for solvers of one call a step; a backward counts as two forwards.

    With shared initial noise the steps before the first noisy one run once per group.
    """
    prefix = plan.first_noisy() if shared_noise else 0
    return prefix / group_size + plan.num_steps - prefix + 3 * plan.num_scored


def num_positions(num_steps: int, window: int) -> int:
    """Window starts of one full slide."""
    return num_steps - SKIP_LAST - window + 1


def count(method: Method, num_steps: int, group_size: int, iterations: range | list[int]) -> float:
    """Forward-equivalents per row, averaged over `iterations`."""
    steps, grid = build("steps", "steps", method.steps), torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    costs = [forward_equivalents(steps(i, grid, torch.arange(1)), group_size, method.shared_noise) for i in iterations]
    return statistics.fmean(costs)
