"""Schedulers of diffusers: the grid is theirs, the step is ours. So a setting moves the grid, or it is refused.

Their one step that ours gives is x + (sigma_next - sigma) (noise - data), of FlowMatchEulerDiscreteScheduler.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

KNOWN = "FlowMatchEulerDiscreteScheduler"
GRID = frozenset(
    {
        *("shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
        *("shift_terminal", "time_shift_type", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    }
)
"""Settings that move the grid and nothing else: honoured, for the grid is read off the scheduler itself."""
FIXED: Mapping[str, tuple[Any, str]] = {
    "num_train_timesteps": (1000, "our networks are told the time in thousandths"),
    "invert_sigmas": (False, "the grid has to fall from noise to data"),
    "stochastic_sampling": (False, "fresh noise in each step is a kernel's affair, see policy.kernel"),
}
"""Settings that change something else: the value that is taken, and why no other is."""


def check(scheduler: Any, checkpoint: str) -> None:
    """ValueError for a scheduler, or a setting of one, whose pipeline would do other steps than ours."""
    where, name = f"{checkpoint}/scheduler/scheduler_config.json", type(scheduler).__name__
    if name != KNOWN:
        raise ValueError(
            f"{where}: the scheduler is a {name}, whose steps are not ours: save the pipeline with {KNOWN}"
        )
    for setting, value in scheduler.config.items():
        if setting in GRID or setting.startswith("_"):  # those are diffusers' notes
            continue
        if setting not in FIXED:
            raise ValueError(f"{where}: {setting} is no setting of {name} that is known here: take it out")
        wanted, why = FIXED[setting]
        if value != wanted:
            raise ValueError(f"{where}: {setting} is {value!r}, and only {wanted!r} is possible ({why}): set it so")


def grid(
    scheduler: Any, num_steps: int | None = None, sigmas: np.ndarray | None = None, mu: float | None = None
) -> Tensor:
    """(K + 1,) from 1 to 0 as the scheduler sets it, of K steps or of given sigmas (K,); ValueError if not finite."""
    own = copy.deepcopy(scheduler)
    with np.errstate(all="ignore"):  # what comes of it is looked at here
        own.set_timesteps(num_steps, sigmas=sigmas, mu=mu)
    found: Tensor = own.sigmas
    if not bool(torch.isfinite(found).all()):
        fix = (
            "one step goes from noise to data on any grid: set policy.grid=uniform"
            if len(found) == 2
            else ("set policy.grid=uniform, or repair scheduler_config.json")
        )
        raise ValueError(f"{type(own).__name__} sets sigmas {found.tolist()} for {len(found) - 1} steps: {fix}")
    return found


def resolution_shift(scheduler: Any, tokens: int, max_shift: float) -> float:
    """mu of a dynamic shift: linear in the number of image tokens, by the scheduler's config (Esser et al. 2024)."""
    c = scheduler.config
    low, high = c.get("base_image_seq_len", 256), c.get("max_image_seq_len", 4096)
    base = c.get("base_shift", 0.5)
    slope = (c.get("max_shift", max_shift) - base) / (high - low)
    return tokens * slope + base - slope * low
