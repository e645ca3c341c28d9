"""The un-tuned policy of a config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlflow import registry
from rlflow.assembly.environment import make_simulator
from rlflow.assembly.network import opened_field, policy_around
from rlflow.config.schema import Config
from rlflow.config.steps import make_steps
from rlflow.flow.field import VelocityField
from rlflow.flow.policy import FlowPolicy
from rlflow.models.io import embedded
from rlflow.models.scratch import make_field
from rlflow.parallel import dist, shards
from rlflow.parallel.dist import device


def make_policy(config: Config, trust_code: bool = False) -> FlowPolicy:
    """The un-tuned policy of a config, on this process's device."""
    torch.manual_seed(config.train.seed)  # the first weights of a toy field and of a noise net
    with registry.located("policy.field"):
        field = new_field(config, trust_code)
    sharded = config.train.sharding == "full" and dist.world() > 1
    policy = policy_around(field, config, trust_code, torch.device("cpu") if sharded else None)
    if sharded:  # block by block: the whole network need not fit the device
        shards.shard(policy.field.unguided, device())
        policy.kernel.to(device())
    steps = make_steps(config, trust_code)
    with registry.located("steps"):
        policy.check_steps(steps, config.policy.max_kappa)
    return policy


def new_field(config: Config, trust_code: bool) -> VelocityField:
    """From a checkpoint, or from scratch to fit the simulator."""
    if (opened := opened_field(config, trust_code)) is not None:
        return opened
    if config.env.name == "prompt":
        raise ValueError(
            f"a network from scratch makes no images: name one of {embedded()} or a checkpoint folder, or a simulator"
        )
    env = make_simulator(config, 1, trust_code)
    return make_field(config.policy.field, env.obs_spec, env.action_shape, trust_code)


@contextmanager
def whole_field(policy: FlowPolicy, config: Config) -> Iterator[VelocityField]:
    """The network under the weights in place; of a sharded one a copy on the CPU, which is complete on rank 0."""
    if not any(shards.is_sharded(p) for p in policy.parameters()):
        yield policy.field.unguided
        return
    state = shards.whole_state(policy)
    if dist.rank() > 0:
        yield policy.field.unguided
        return
    copy = policy_around(new_field(config, trust_code=True), config, trust_code=True, place=torch.device("cpu"))
    copy.load_state_dict(state)
    yield copy.field.unguided
