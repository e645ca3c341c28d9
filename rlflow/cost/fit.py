"""Settings that make a recipe fit a card, from the mildest; none of them changes what is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlflow.config.algorithms import AlgorithmConfig, RewardGradientConfig
from rlflow.config.schema import Config
from rlflow.cost.estimate import Estimate, Planner
from rlflow.cost.gpus import GPU

RESERVE = 0.9
"""Share of a GPU's memory that tensors may take; the rest is the driver's context and fragments."""


@dataclass(frozen=True)
class Fit:
    """Settings that were tried, in order, and what they bring the peak to."""

    overrides: dict[str, Any]
    estimate: Estimate
    fits: bool


def make_fit(planner: Planner, gpu: GPU, gpus: int = 1) -> Fit:
    """The first settings, from the mildest, whose peak fits; the smallest there is where none does."""
    limit, config = RESERVE * 1e9 * gpu.gigabytes, planner.config
    overrides: dict[str, Any] = {}
    found = planner.estimate(config, gpus)
    while found.memory.peak > limit:
        change = _next_change(planner, config, found)
        if change is None:
            return Fit(overrides, found, False)
        overrides |= change
        config = _with(config, change)
        found = planner.estimate(config, gpus)
    return Fit(overrides, found, True)


def _next_change(planner: Planner, config: Config, found: Estimate) -> dict[str, Any] | None:
    """One setting that lowers the worst moment; none of them changes what is learnt."""
    assert isinstance(config.algorithm, AlgorithmConfig | RewardGradientConfig)
    worst, rows, pairs = found.memory.worst, config.env.rows_per_call, config.algorithm.micro_batch
    smallest = config.env.group_size if config.env.mode == "episodes" else 1
    if worst in ("sampling", "decoding") and rows > smallest:
        return {"env.rows_per_call": max(smallest, rows // 2)}
    if worst == "scoring" and not config.policy.grad_checkpointing:
        return {"policy.grad_checkpointing": True}
    if worst in ("scoring", "the reward's gradient") and pairs > 1:
        return {"algorithm.micro_batch": pairs // 2}
    parts = {"train.sharding": "full"}
    shardable = found.gpus > 1 and planner.allows(_with(config, parts), found.gpus)
    return parts if shardable and config.train.sharding == "replicated" else None


def more_gpus(planner: Planner, gpu: GPU, gpus: int) -> tuple[int, Fit] | None:
    """The next power of two of GPUs on which it fits, a network in parts if need be; None where none is found."""
    config = planner.config
    while (gpus := 2 * gpus) <= config.env.num_groups:
        if planner.allows(config, gpus) and (fit := make_fit(planner, gpu, gpus)).fits:
            return gpus, fit
    return None


def other_ways(config: Config) -> str:
    """What would change the training itself, of a pre-trained network."""
    field = config.policy.field
    if not isinstance(field, Mapping) or field.get("name") != "pretrained":
        return ""
    if field.get("lora") is None and field.get("adapter") is None:
        return "\nA LoRA needs far less than the whole network: policy.field.lora=32 policy.field.weights=bfloat16"
    if field.get("quantize") is None:
        return "\nA quantised base takes a half or a third: policy.field.quantize=int8 or nf4"
    return ""


def _with(config: Config, change: Mapping[str, Any]) -> Config:
    for path, value in change.items():
        section, _, key = path.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config
