"""What the numbers of a config may be, and which settings exclude each other; a message names the path and the fix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rlflow import registry

if TYPE_CHECKING:
    from rlflow.config.schema import Config

POSITIVE = (
    *("policy.num_steps", "policy.max_kappa", "env.num_groups", "env.group_size", "env.rows_per_call"),
    *("reward.timeout_s", "algorithm.epochs", "algorithm.num_minibatches", "algorithm.micro_batch"),
    *("algorithm.clip_low", "algorithm.clip_high", "algorithm.target_kl", "algorithm.critic_steps"),
    *("algorithm.clip_base", "algorithm.critic_width", "algorithm.denoising_gamma"),
    *("algorithm.nft.beta", "algorithm.nft.clip"),
    *("algorithm.optimizer.eps", "algorithm.optimizer.max_bad_steps"),
    *("train.iterations", "train.minutes", "train.threads", "train.checkpoint_every", "train.keep"),
    *("eval.num", "eval.num_steps", "eval.resolution", "eval.rows_per_call", "eval.grid", "advantage.clip"),
    *("env.gamma", "env.horizon", "env.frame_stack"),
    *("algorithm.batch_size", "algorithm.capacity", "algorithm.updates_per_step"),
    *("algorithm.actor_every", "algorithm.alpha", "algorithm.num_critics", "algorithm.critic_depth", "algorithm.tau"),
)
NOT_NEGATIVE = (
    *("eval.every", "eval.video", "algorithm.kl.beta", "algorithm.entropy", "algorithm.optimizer.warmup"),
    *("algorithm.optimizer.weight_decay", "algorithm.optimizer.max_grad_norm", "advantage.eps"),
    *("algorithm.anchor", "algorithm.critic_warmup", "algorithm.start", "algorithm.alpha_lr"),
    *("algorithm.max_grad_norm", "algorithm.offline.clone", "algorithm.offline.updates", "algorithm.nft.old_rate"),
)
UNIT = (
    *("algorithm.denoising_gamma", "algorithm.optimizer.final", "env.gamma", "advantage.lam", "algorithm.tau"),
    "policy.guidance.zero_until",
)
LEARNING_RATES = ("algorithm.optimizer.lr", "algorithm.critic_lr", "algorithm.lr")
"""Adam's first step is lr long in every weight: above 1 nothing of the network is left."""
SEEDS = ("train.seed", "eval.seed")
BELOW_ONE = ("algorithm.ema_decay", "algorithm.optimizer.betas", "algorithm.offline.share", "algorithm.nft.old_max")
FINITE = (
    *("algorithm.optimizer.eps", "algorithm.optimizer.weight_decay"),
    *("algorithm.kl.beta", "algorithm.entropy", "algorithm.anchor", "advantage.eps"),
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


def check_together(config: Config, trust_code: bool = False) -> None:
    """ValueError for settings that exclude each other."""
    OF_LEARNERS[config.algorithm.name](config, trust_code)
    _check_kind(config)
    _check_sharding(config)
    if config.train.iterations is None and config.train.minutes is None:
        raise ValueError("train: give a budget, train.iterations=N or train.minutes=M")


def _check_sac(config: Config, trust_code: bool) -> None:
    """ValueError for settings that off-policy learning does not read."""
    for path, usual, why in (("likelihood", "chain", "it has no ratio"), ("advantage", "group", "it has critics")):
        if registry.split_spec(path, getattr(config, path)) != (usual, {}):
            raise ValueError(f"{path}: algorithm=sac does not read it ({why}); leave it out")
    if registry.split_spec("steps", config.steps)[0] != "all":
        raise ValueError("steps: algorithm=sac differentiates through every denoising step; set steps=all")
    if config.env.name == "prompt":
        raise ValueError("env.name: algorithm=sac learns in simulators, and env.name is prompt")
    if config.reward.normalize == "advantage":
        raise ValueError("reward.normalize: algorithm=sac has no advantages; set it to none or reward")
    c: Any = config.algorithm
    if config.reward.scale:
        raise ValueError(
            "reward.scale: the replay of algorithm=sac would keep quotients of a std that still moves, early ones many "
            "times too large; leave it out, and weigh rewards against entropy by algorithm.alpha"
        )
    if c.offline is not None and config.reward.weights:
        raise ValueError("algorithm.offline: its rewards are the simulator's own; leave reward.weights out")


def _check_policy_gradient(config: Config, trust_code: bool) -> None:
    """ValueError for settings of the clipped policy gradient that exclude each other."""
    c: Any = config.algorithm
    name, _ = registry.split_spec("advantage", config.advantage)
    if name == "group" and config.env.group_size < 2:
        raise ValueError("env.group_size: a group of 1 has no group advantage; set it to 2 or more, or advantage=gae")
    if name == "gae" and config.reward.normalize == "advantage":
        raise ValueError(
            "reward.normalize: gae has one critic for the sum of the rewards and cannot normalise each one's "
            "advantage; set reward.normalize=reward, or advantage=group"
        )
    if name == "group" and c.critic_warmup:
        raise ValueError("algorithm.critic_warmup: group advantages have no critic; set it to 0, or advantage=gae")
    likelihood = registry.build("likelihood", "likelihood", config.likelihood, trust_code=trust_code)
    if likelihood.joint and (c.clip_base is not None or c.denoising_gamma != 1):
        raise ValueError(
            "algorithm.denoising_gamma, algorithm.clip_base: a joint ratio has no single steps; "
            "set likelihood.joint=false"
        )
    if c.guard and likelihood.joint:
        raise ValueError("algorithm.guard: GRPO-Guard re-scales each step's ratio; set likelihood.joint=false")
    if c.nft is not None:
        _check_nft(config, likelihood)
    if config.env.name == "prompt" and c.num_minibatches > config.env.num_groups:
        raise ValueError(
            f"algorithm.num_minibatches: {c.num_minibatches} is more than "
            f"env.num_groups = {config.env.num_groups}, and a minibatch takes whole groups"
        )
    if isinstance(config.advantage, dict) and name == "gae" and "gamma" in config.advantage:
        raise ValueError("advantage.gamma: the discount, of a primitive step, is env.gamma: set it there")
    if name == "group" and config.env.mode == "steps":
        raise ValueError("env.mode: group advantages compare whole episodes; set env.mode=episodes, or advantage=gae")


def _check_nft(config: Config, likelihood: Any) -> None:
    """ValueError for settings of a ratio beside a loss that has none, and for other evidence than matching draws."""
    from rlflow.rl.nft import NFT

    c: Any = config.algorithm
    with registry.located("algorithm.nft"):
        NFT().check(likelihood)
    for name, usual in (("trust_region", "clip"), ("target_kl", None)):
        if getattr(c, name) != usual:
            raise ValueError(f"algorithm.{name}: holds a ratio, and algorithm.nft has none; leave it at {usual!r}")


OF_LEARNERS = {"policy_gradient": _check_policy_gradient, "sac": _check_sac}


def _check_sharding(config: Config) -> None:
    """ValueError where the number of network passes depends on what happens in a process."""
    if config.train.sharding == "full" and (config.env.name != "prompt" or config.algorithm.name != "policy_gradient"):
        raise ValueError(
            "train.sharding: processes that hold parts of one network must call it equally often, as with images "
            "and policy_gradient; set it to replicated"
        )


def _check_kind(config: Config) -> None:
    """ValueError for settings of images in a simulator, and the other way round."""
    if config.env.name == "prompt":
        if not any(config.reward.weights.values()):
            raise ValueError("reward.weights: name at least one reward with a weight that is not 0")
        for path, value, usual in (
            ("env.settings", config.env.settings, {}),
            ("env.horizon", config.env.horizon, None),
            ("env.mode", config.env.mode, "episodes"),
            ("env.frame_stack", config.env.frame_stack, 1),
            ("reward.scale", config.reward.scale, False),
            ("eval.train_mode", config.eval.train_mode, False),
        ):
            if value != usual:
                raise ValueError(f"{path}: is of simulators, and env.name is prompt; leave it at {usual!r}")
    elif config.eval.metrics:
        raise ValueError("eval.metrics: judges images; episodes have return, length and success: leave it {}")


def check(config: Config, trust_code: bool = False) -> None:
    """Everything that can be known without loading a network; ValueError with the path and the fix."""
    with registry.located("env.name"):
        registry.find("env", config.env.name, trust_code)
    check_numbers(config)
    check_together(config, trust_code)
    stand_in = {"num_features": 1, "event_shape": (1,)}
    for kind, path, spec, supplied in (
        ("kernel", "policy.kernel", config.policy.kernel, stand_in),
        ("solver", "policy.solver", config.policy.solver, {}),
        ("grid", "policy.grid", config.policy.grid, {"field": None}),
        ("advantage", "advantage", config.advantage, {"gamma": config.env.gamma}),
        ("solver", "eval.solver", config.eval.solver, {}),
    ):
        if spec is not None:
            registry.build(kind, path, spec, supplied, trust_code)
    if config.policy.guidance is not None:
        registry.validate("guidance", "policy.guidance", config.policy.guidance, ("field",), trust_code)
    _check_rewards(config, trust_code)
    if config.env.name != "prompt":
        spec = {**config.env.settings, "name": config.env.name}
        registry.validate("env", "env.settings", spec, ("num_envs", "gamma"), trust_code)
    steps = registry.build("steps", "steps", config.steps, trust_code=trust_code)
    with registry.located("steps"):
        steps.possible(config.policy.num_steps)


def _check_rewards(config: Config, trust_code: bool) -> None:
    """Every reward asked for exists, with settings it has; no settings lie about."""
    from rlflow.rewards.component import check_reward, check_unused

    weights, metrics = list(config.reward.weights), list(config.eval.metrics.values())
    for section, names in (("reward.weights", weights), ("eval.metrics", metrics)):
        for name in names:
            check_reward(section, name, config.reward.settings, trust_code)
    check_unused(config.reward.settings, weights + metrics)
