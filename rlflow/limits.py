"""What the numbers of a config may be, and which settings exclude each other; a message names the path and the fix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rlflow import registry

if TYPE_CHECKING:
    from rlflow.config import Config

POSITIVE = (
    *("policy.num_steps", "policy.max_kappa", "env.num_groups", "env.group_size", "env.rows_per_call"),
    *("reward.timeout_s", "algorithm.epochs", "algorithm.num_minibatches", "algorithm.micro_batch"),
    *("algorithm.clip_low", "algorithm.clip_high", "algorithm.target_kl", "algorithm.critic_steps"),
    *("algorithm.optimizer.eps", "algorithm.optimizer.max_bad_steps"),
    *("train.iterations", "train.minutes", "train.threads", "train.checkpoint_every", "train.keep"),
    *("eval.num", "eval.num_steps", "eval.rows_per_call", "eval.grid", "advantage.clip"),
)
NOT_NEGATIVE = (
    *("eval.every", "algorithm.kl.beta", "algorithm.entropy", "algorithm.optimizer.warmup", "advantage.eps"),
    *("algorithm.optimizer.weight_decay", "algorithm.optimizer.max_grad_norm"),
)
LEARNING_RATES = ("algorithm.optimizer.lr", "algorithm.critic_lr")
"""Adam's first step is lr long in every weight: above 1 nothing of the network is left."""
SEEDS = ("train.seed", "eval.seed")
UNIT = ("algorithm.optimizer.final", "advantage.gamma", "advantage.lam", "policy.guidance.zero_until")
BELOW_ONE = ("algorithm.ema_decay", "algorithm.optimizer.betas")
FINITE = (
    *("algorithm.optimizer.eps", "algorithm.optimizer.weight_decay"),
    *("algorithm.kl.beta", "algorithm.entropy", "advantage.eps"),
)
"""Of the others an infinite one means: no limit."""
LARGEST = 1e30
"""Of a finite number anywhere: its products with a few others still fit float32."""
RANGES = {
    "must be in (0, 1]": (LEARNING_RATES, lambda v: 0 < v <= 1),
    "must be in [0, 2**63)": (SEEDS, lambda v: 0 <= v < 2**63),
    "must be positive": (POSITIVE, lambda v: v > 0),
    "must not be negative": (NOT_NEGATIVE, lambda v: v >= 0),
    "must be in [0, 1]": (UNIT, lambda v: 0 <= v <= 1),
    "must be in [0, 1)": (BELOW_ONE, lambda v: 0 <= v < 1),
}


def check_numbers(config: Config) -> None:
    """ValueError with the path of a number that is out of its range, not finite or absurdly large."""
    for what, (paths, allowed) in RANGES.items():
        for path in paths:
            value = _find(config, path)
            for number in value if isinstance(value, tuple | list) else [value]:
                if isinstance(number, int | float) and not allowed(number):
                    raise ValueError(f"{path}: {what}, got {number}")
                if path in FINITE and number == math.inf:
                    raise ValueError(f"{path}: must be finite, got inf")
    for path, number in _numbers(config.to_dict()):
        if LARGEST < abs(number) < math.inf:
            raise ValueError(f"{path}: must be at most 1e30, got {number}")


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of nested sections with its path."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}.")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int | float):
                yield path, item


def _find(config: Config, path: str) -> Any:
    """The value at a path, in a section or in a component's settings; None where it is not set, or not ours."""
    node: Any = config
    for part in path.split("."):
        if isinstance(node, dict):
            foreign = ":" in str(node.get("name"))  # its setting of the same name may mean something else
            node = None if foreign else node.get(part)
        else:
            node = getattr(node, part, None)
    return node


def check_together(config: Config) -> None:
    """ValueError for settings that exclude each other."""
    name, _ = registry.split_spec("advantage", config.advantage)
    if name == "group" and config.env.group_size < 2:
        raise ValueError("env.group_size: a group of 1 has no group advantage; set it to 2 or more, or advantage=gae")
    if name == "gae" and config.reward.normalize == "advantage":
        raise ValueError(
            "reward.normalize: gae has one critic for the sum of the rewards and cannot normalise each one's "
            "advantage; set reward.normalize=reward, or advantage=group"
        )
    if config.algorithm.guard and config.likelihood.joint:
        raise ValueError("algorithm.guard: GRPO-Guard re-scales each step's ratio; set likelihood.joint=false")
    if config.env.num_groups % config.algorithm.num_minibatches:
        raise ValueError(
            f"algorithm.num_minibatches: {config.algorithm.num_minibatches} must divide "
            f"env.num_groups = {config.env.num_groups}, since a minibatch takes whole groups"
        )
    if config.env.name == "prompt" and not any(config.reward.weights.values()):
        raise ValueError("reward.weights: name at least one reward with a weight that is not 0")
    if config.train.iterations is None and config.train.minutes is None:
        raise ValueError("train: give a budget, train.iterations=N or train.minutes=M")
