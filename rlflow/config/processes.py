"""What a number of processes allows: the one place that train, doctor and plan ask."""

from __future__ import annotations

from rlflow import registry
from rlflow.config.limits import check_sharding
from rlflow.config.schema import Config
from rlflow.envs.seeds import first_seed
from rlflow.rl.groups import Groups


def share(config: Config, rank: int = 0, world: int = 1) -> Groups:
    """The groups of process `rank`; ValueError, with the setting to change, where `world` cannot share a run.

    Start states depend on the run's seed, as the order of prompts in PromptEnv does.
    """
    num, env = _minibatches(config), config.env
    first = 0 if env.name == "prompt" else first_seed(config.train.seed)
    with registry.located("env"):
        groups = Groups(env.num_groups, env.group_size, rank, world, first)
    if config.train.sharding == "full" and groups.local % num:  # it would be called unequally often, and wait for ever
        raise ValueError(
            f"train.sharding: {groups.local} groups of a process do not divide into {num} equal minibatches: "
            f"set env.num_groups to a multiple of {num * world}, or train.sharding=replicated"
        )
    if config.eval.num < world:
        raise ValueError(f"eval.num: {config.eval.num} cannot be shared by {world} processes")
    return groups


def check_updates(config: Config, groups: Groups, horizon: int) -> None:
    """ValueError where an update of `horizon` steps leaves a process without work."""
    with registry.located("algorithm"):
        groups.check_minibatches(horizon, _minibatches(config))


def _minibatches(config: Config) -> int:
    return getattr(config.algorithm, "num_minibatches", 1)


def can_share(config: Config, world: int, horizon: int) -> bool:
    """True where training would start with so many processes."""
    try:
        check_sharding(config)
        check_updates(config, share(config, world=world), horizon)
    except ValueError:
        return False
    return True
