"""From a Config to live objects; the only place that knows both."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch

from rlflow import dist, registry
from rlflow.config import Config
from rlflow.envs.prompts import Prompts, load_prompts
from rlflow.flow.field import VelocityField
from rlflow.flow.policy import FlowPolicy
from rlflow.models.io import embedded, load_field
from rlflow.models.mlp import MLPField
from rlflow.rewards.base import Reward, RewardSet
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.rl.likelihood import ChainLikelihood
from rlflow.rl.losses import PerStep
from rlflow.rl.optim import AdamW
from rlflow.rl.policy_gradient import KL, PolicyGradient

PRECISION = {"float32": None, "float64": None, "bfloat16": torch.bfloat16}


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def make_policy(config: Config, trust_code: bool = False) -> FlowPolicy:
    """The un-tuned policy of a config, on this process's device."""
    c = config.policy
    torch.manual_seed(config.train.seed)  # the first weights of a toy field and of a noise net
    with registry.located("policy.field"):
        field = _toy_field(config, trust_code) if c.field == "toy" else load_field(c.field, trust_code)
    if c.frozen is not None:
        with registry.located("policy.frozen"):
            freeze(field, c.frozen)
    if c.grad_checkpointing:
        field.grad_checkpointing = True
    if c.precision == "float64":
        field = field.double()
    field = field.to(device())
    shapes = {"num_features": field.num_features, "event_shape": tuple(field.event_shape)}
    kernel = registry.build("kernel", "policy.kernel", c.kernel, shapes, trust_code)
    kernel = kernel.to(device(), torch.float64 if c.precision == "float64" else torch.float32)
    if c.guidance is not None:
        field = registry.build("guidance", "policy.guidance", c.guidance, {"field": field}, trust_code)
    policy = FlowPolicy(
        field,
        kernel,
        solver=registry.build("solver", "policy.solver", c.solver, trust_code=trust_code),
        grid=registry.build("grid", "policy.grid", c.grid, trust_code=trust_code),
        num_steps=c.num_steps,
        squash=torch.nn.Tanh() if c.squash == "tanh" else None,
        autocast=PRECISION[c.precision],
    )
    steps = registry.build("steps", "steps", config.steps, trust_code=trust_code)
    with registry.located("steps"):
        policy.check_steps(steps, c.max_kappa)
    return policy


def freeze(field: VelocityField, pattern: str) -> None:
    """Exclude parameters in whose names the regular expression is found; ValueError if it finds none, or all."""
    try:
        found = {name for name, _ in field.named_parameters() if re.search(pattern, name)}
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    everything = {name for name, _ in field.named_parameters()}
    if not found or found == everything:
        parts = sorted({name.partition(".")[0] for name in everything})
        raise ValueError(
            f"{pattern!r} is found in {'all' if found else 'no'} parameters: set it to null, or name {parts}"
        )
    for name, parameter in field.named_parameters():
        parameter.requires_grad_(name not in found)


def _toy_field(config: Config, trust_code: bool) -> MLPField:
    if config.env.name == "prompt":
        raise ValueError(
            f"'toy' reads numbers and env.name=prompt gives text: name one of {embedded()} or a checkpoint folder, "
            "or a toy environment"
        )
    env: Any = registry.find("env", config.env.name, trust_code)(1)
    return MLPField(env.obs_dim, env.action_shape, width=64)


def make_rewards(config: Config, trust_code: bool = False) -> RewardSet:
    """The training rewards."""
    c = config.reward
    found = [Reward(_short(n), registry.find("reward", n, trust_code), w, c.timeout_s) for n, w in c.weights.items()]
    return RewardSet(found, c.normalize)


def make_judges(config: Config, trust_code: bool = False) -> RewardSet:
    """The evaluation metrics under their display names."""
    found = [Reward(n, registry.find("reward", r, trust_code), 1.0, 600.0) for n, r in config.eval.metrics.items()]
    return RewardSet(found)


def _short(name: str) -> str:
    """Metric name of a reward: the function's own name for a dotted path."""
    return name.rpartition(":")[2].rpartition(".")[2]


def heldout_prompts(config: Config) -> Prompts:
    """What evaluation uses: its own file, or the held-out part of the training prompts."""
    return load_prompts(config.eval.prompts or config.env.prompts, "heldout", whole=config.eval.prompts is not None)


def judged_by(config: Config) -> dict[str, Any]:
    """The sections that evaluate a checkpoint as this config does, for its config.json."""
    c = config.eval
    deployed = {"num_steps": c.num_steps or config.policy.num_steps, "solver": c.solver or config.policy.solver}
    judged = {"prompts": c.prompts, "metrics": c.metrics, "num": c.num, **deployed}
    policy = {"guidance": config.policy.guidance, "precision": config.policy.precision}
    return {"policy": policy, "env": {"prompts": config.env.prompts}, "eval": judged}


@dataclass
class Parts:
    """Everything a training loop holds."""

    policy: FlowPolicy
    collector: Collector
    algorithm: PolicyGradient
    groups: Groups


def make_parts(config: Config, trust_code: bool = False) -> Parts:
    """Policy, environment, collector and learner of this process."""
    policy = make_policy(config, trust_code)
    groups = Groups(config.env.num_groups, config.env.group_size, dist.rank(), dist.world())
    env = _make_env(config, policy, groups, trust_code)
    likelihood = ChainLikelihood(**dataclasses.asdict(config.likelihood))
    steps = registry.build("steps", "steps", config.steps, trust_code=trust_code)
    collector = Collector(
        env,
        policy,
        likelihood,
        steps,
        groups,
        seed=config.train.seed,
        horizon=env.horizon,
        rows_per_call=config.env.rows_per_call,
        shared_noise=config.env.shared_noise,
    )
    return Parts(policy, collector, _make_algorithm(config, policy, likelihood, groups, trust_code), groups)


def _make_env(config: Config, policy: FlowPolicy, groups: Groups, trust_code: bool) -> Any:
    env = registry.find("env", config.env.name, trust_code)
    if config.env.name != "prompt":
        return env(groups.num_rows)
    field = policy.field.unguided
    with registry.located("env.prompts"):
        prompts = load_prompts(config.env.prompts, "train", whole=config.eval.prompts is not None)
        prompts.check(field.tokenize)
    with registry.located("env.prompts" if config.eval.prompts is None else "eval.prompts"):
        heldout_prompts(config).check(field.tokenize)
    return env(
        prompts,
        make_rewards(config, trust_code),
        groups.num_rows,
        policy.event_shape,
        field.tokenize,
        field.decode,
        config.train.seed,
    )


def _make_algorithm(
    config: Config, policy: FlowPolicy, likelihood: ChainLikelihood, groups: Groups, trust_code: bool
) -> PolicyGradient:
    c = config.algorithm
    torch.manual_seed(config.train.seed)  # the critic's first weights
    return PolicyGradient(
        policy,
        likelihood,
        registry.build("advantage", "advantage", config.advantage, trust_code=trust_code),
        groups,
        optimizer=AdamW(**dataclasses.asdict(c.optimizer)),
        clip_low=c.clip_low,
        clip_high=c.clip_high,
        epochs=c.epochs,
        num_minibatches=c.num_minibatches,
        micro_batch=c.micro_batch,
        kl=KL(c.kl.beta, c.kl.kind),
        guard=c.guard,
        entropy=c.entropy,
        target_kl=c.target_kl,
        anchor=c.anchor,
        per_step=PerStep(c.denoising_gamma, c.clip_base),
        critic_steps=c.critic_steps,
        critic_lr=c.critic_lr,
        critic_width=c.critic_width,
        critic_warmup=c.critic_warmup,
        ema_decay=c.ema_decay,
        seed=config.train.seed,
    )
