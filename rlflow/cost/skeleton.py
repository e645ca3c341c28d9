"""A recipe's policy as shapes alone: the architecture from config.json, no weights read, nothing downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rlflow import registry
from rlflow.assembly.environment import make_simulator
from rlflow.assembly.network import policy_around
from rlflow.config.algorithms import AlgorithmConfig, RewardGradientConfig
from rlflow.config.schema import Config
from rlflow.cost.trace import fake_mode
from rlflow.envs.prompts import load_prompts
from rlflow.flow.field import VelocityField
from rlflow.flow.policy import FlowPolicy
from rlflow.models.hub import is_hub_id
from rlflow.models.io import read_config
from rlflow.models.lerobot import shapes as lerobot
from rlflow.models.pretrained.opening import is_pipeline
from rlflow.models.pretrained.shapes_of import beside, shape_of
from rlflow.models.scratch import make_field
from rlflow.rl.critic import Critic
from rlflow.rl.learners.reward_gradient import Through
from rlflow.rl.likelihoods.base import Likelihood
from rlflow.rl.objectives.base import Objective
from rlflow.types import Tree

META = torch.device("meta")


@dataclass(frozen=True)
class Skeleton:
    """A policy without storage, what it observes (one row, no row axis), and the longest episode's steps."""

    policy: FlowPolicy
    obs_spec: Tree
    horizon: int
    mode: FakeTensorMode
    likelihood: Likelihood | None = None
    objective: Objective | None = None
    critic: Critic | None = None
    through: Through | None = None
    """Of reward gradients, which have none of the three before it."""


def skeleton(config: Config, trust_code: bool = False) -> Skeleton:
    """Of a recipe; ValueError where the network cannot be known without its weights."""
    algorithm = config.algorithm
    if not isinstance(algorithm, AlgorithmConfig | RewardGradientConfig):
        raise ValueError(f"algorithm: plan knows policy_gradient and reward_gradient, and not {algorithm.name}")
    with registry.located("policy.field"):
        field, obs_spec, horizon = _field(config, trust_code)
    policy, mode, critic = policy_around(field, config, trust_code, META), fake_mode(), None
    if isinstance(algorithm, AlgorithmConfig) and registry.split_spec("advantage", config.advantage)[0] == "gae":
        with META:
            critic = Critic(policy.field.num_features, algorithm.critic_width).to(policy.dtype)
    with mode:
        for module in (policy, *([critic] if critic else []), *beside(policy.field.unguided)):
            _pretend(module)
    if isinstance(algorithm, RewardGradientConfig):
        through = registry.build("through", "algorithm.through", algorithm.through, trust_code=trust_code)
        return Skeleton(policy, obs_spec, horizon, mode, through=through)
    likelihood = registry.build("likelihood", "likelihood", config.likelihood, trust_code=trust_code)
    supplied = {"likelihood": likelihood}
    objective = registry.build("objective", "algorithm.objective", algorithm.objective, supplied, trust_code)
    return Skeleton(policy, obs_spec, horizon, mode, likelihood, objective, critic)


def _field(config: Config, trust_code: bool) -> tuple[VelocityField, Tree, int]:
    """The network on the meta device, one observation, the horizon."""
    spec = config.policy.field
    if config.env.name == "prompt":
        text = str(load_prompts(config.env.prompts, "train").rows[0]["prompt"])
        field = _of_prompts(spec, trust_code)
        return field, field.tokenize([text])[0], 1
    if lerobot.is_policy(spec):  # its environment may be installed on another machine only
        return *lerobot.shape_of(str(spec["checkpoint"]), spec), config.env.horizon or 1
    env = make_simulator(config, 1, trust_code)
    if isinstance(spec, str) and spec not in registry.TABLE["model"]:
        return _known(spec, trust_code), env.obs_spec, env.horizon
    with META:
        return make_field(spec, env.obs_spec, env.action_shape, trust_code), env.obs_spec, env.horizon


def _of_prompts(spec: Any, trust_code: bool) -> VelocityField:
    """A checkpoint of ours, or a diffusers pipeline, by its name alone or with settings."""
    if not isinstance(spec, str):
        return shape_of(str(spec.get("checkpoint")), spec)
    return shape_of(spec, {}) if is_pipeline(spec) or is_hub_id(spec) else _known(spec, trust_code)


def _known(name: str, trust_code: bool) -> VelocityField:
    """The architecture of a checkpoint's config.json."""
    config = read_config(name)
    model = registry.find("model", config["model"], trust_code)
    with META:
        return model(**config["args"])


def _pretend(module: nn.Module) -> None:
    """Put tensors of the CPU, without storage, in place of those on the meta device."""
    memo: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, value in table.items():
                if value is not None and id(value) not in memo:
                    like = torch.empty(value.shape, dtype=value.dtype)
                    is_weight = isinstance(value, nn.Parameter)
                    memo[id(value)] = nn.Parameter(like, value.requires_grad) if is_weight else like
                if value is not None:
                    table[name] = memo[id(value)]  # type: ignore[assignment]
