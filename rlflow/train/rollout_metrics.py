"""What is logged of a rollout: rewards, the size of samples and the episodes that ended, over all ranks."""

from __future__ import annotations

import math

from rlflow.parallel import dist
from rlflow.rl.advantages import moments
from rlflow.types import Rollout


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Named numbers, the same on every rank; all ranks have to ask at once."""
    return _reward_metrics(rollout) | _sample_metrics(rollout) | _episode_metrics(rollout)


def _reward_metrics(rollout: Rollout) -> dict[str, float]:
    """Mean and std of the total and of each reward over all ranks; a mean of nothing is nan, not 0."""
    named = {f"reward/{name}": (value, value.isfinite()) for name, value in rollout.reward_parts.items()}
    out: dict[str, float] = {}
    for name, (value, weight) in {"reward": (rollout.reward, rollout.weight), **named}.items():
        mean, std, count = (float(m) for m in moments(value, weight))
        out |= {f"{name}/mean": mean if count else math.nan, f"{name}/std": std if count else math.nan}
        masked = dist.all_sum((~value.isfinite()).double().mean()) / dist.world()  # ranks have equal numbers of rows
        out[f"{name}/masked_frac"] = float(masked)
    return out


def _sample_metrics(rollout: Rollout) -> dict[str, float]:
    """Root mean square of a sample's numbers, of images, where it drifts as they glare or blur."""
    if rollout.num_steps is not None:
        return {}
    norm = rollout.action.flatten(2).float().square().mean(2).sqrt()
    return {"rollout/sample_norm": float(moments(norm, rollout.weight)[0])}


def _episode_metrics(rollout: Rollout) -> dict[str, float]:
    """Mean return, length and success of the episodes that ended, over all ranks; nothing where none did."""
    out: dict[str, float] = {}
    for name in ("episode_return", "episode_length", "success"):
        if name in rollout.info:
            value = rollout.info[name]
            mean, _, count = moments(value, value.isfinite().to(value.dtype))
            out |= {f"rollout/{name}": float(mean)} if count else {}
    return out
