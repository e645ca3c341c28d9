"""Where samples are judged: a simulator as the policy sees it, or prompts and their rewards."""

from __future__ import annotations

from dataclasses import replace

from rlflow import registry
from rlflow.assembly.learner import imitated
from rlflow.assembly.network import opened_field, policy_around
from rlflow.assembly.rewards import make_rewards
from rlflow.config.schema import Config, PolicyConfig
from rlflow.envs.base import VecEnv
from rlflow.envs.checked import Checked
from rlflow.envs.frozen import BasePolicy, Frozen, Steering
from rlflow.envs.prompt import PromptEnv
from rlflow.envs.prompts import Prompts, load_prompts
from rlflow.envs.targets import Targeted
from rlflow.envs.wrappers import Decoded, FrameStack, RewardScaling, RewardWrapper
from rlflow.flow.policy import FlowPolicy
from rlflow.models.io import read_config
from rlflow.rl.groups import Groups


def make_simulator(config: Config, num_envs: int, trust_code: bool = False) -> VecEnv:
    """`num_envs` rows of the config's simulator, as the policy sees it."""
    return _around_frozen(_simulator(config, num_envs, trust_code), config, trust_code)


def _simulator(config: Config, num_envs: int, trust_code: bool) -> VecEnv:
    c = config.env
    supplied = {"num_envs": num_envs, "gamma": c.gamma}
    env: VecEnv = registry.build("env", "env.settings", {**c.settings, "name": c.name}, supplied, trust_code)
    env = Checked(env, c.name)
    if c.targets is not None:
        with registry.located("env"):
            return Targeted(env, c.targets)
    return FrameStack(env, c.frame_stack) if c.frame_stack > 1 else env


def acted_in(env: VecEnv, policy: FlowPolicy, path: str = "policy.field") -> VecEnv:
    """`env` as samples of the policy at `path` reach it: of a network with units of its own they are decoded first."""
    field = policy.field.unguided
    with registry.located(path):
        return Decoded(env, field.decode, policy.event_shape) if field.decodes_actions else env


def make_env(config: Config, policy: FlowPolicy, groups: Groups, trust_code: bool) -> VecEnv:
    if config.env.name == "prompt":
        return _make_prompts(config, policy, groups, trust_code)
    return acted_in(_make_task(config, policy, groups, trust_code), policy)


def _make_task(config: Config, policy: FlowPolicy, groups: Groups, trust_code: bool) -> VecEnv:
    """The simulator to train in: with rewards of the config, or a learned one, scaled."""
    env = _simulator(config, groups.num_rows, trust_code)
    env = imitated(config, env, policy.device, trust_code)
    if any(config.reward.weights.values()):
        env = RewardWrapper(env, make_rewards(config, trust_code))
    env = RewardScaling(env, config.env.gamma) if config.reward.scale else env
    return _around_frozen(env, config, trust_code)


def _around_frozen(env: VecEnv, config: Config, trust_code: bool) -> VecEnv:
    """With the policy of `env.frozen` inside; rewards see what it does, not what the learner does."""
    steering = make_steering(config, trust_code)
    if steering is None:
        return env
    assert isinstance(steering.flow, BasePolicy)
    env = acted_in(env, steering.flow.policy, "env.frozen.policy")
    with registry.located("env.frozen.policy"):
        return Frozen(env, steering)


def make_steering(config: Config, trust_code: bool = False) -> Steering | None:
    """What `env.frozen` says: a frozen policy, sampled as it is evaluated, and what the learner does to it."""
    c = config.env.frozen
    if c is None:
        return None
    with registry.located("env.frozen.policy"):
        flow = BasePolicy(_frozen_policy(config, trust_code))
    made: Steering = registry.build("steering", "env.frozen.steering", c.steering, {"flow": flow}, trust_code)
    return made


DEPLOYED = ("guidance", "precision", "squash", "grid", "num_steps", "solver")
"""What a checkpoint says of the sampler that evaluates it."""


def _frozen_policy(config: Config, trust_code: bool) -> FlowPolicy:
    """The network of `env.frozen.policy` with its own sampler; ValueError where there is none."""
    c = config.env.frozen
    assert c is not None
    checkpoint = isinstance(c.policy, str) and c.policy not in registry.TABLE["model"]
    judged = (read_config(str(c.policy)).get("judged_by") or {}) if checkpoint else {}
    if judged.get("env", {}).get("frozen"):
        raise ValueError(f"{c.policy} acts on a frozen policy of its own: name a policy of the environment")
    name, _ = registry.split_spec("env.frozen.policy", c.policy)
    if not checkpoint and "checkpoint" not in registry.settings(registry.find("model", name, trust_code)):
        raise ValueError(f"{name} is a network from scratch, of which nothing is learnt: name a checkpoint")
    said = {k: v for part in ("policy", "eval") for k, v in judged.get(part, {}).items() if k in DEPLOYED}
    said |= {} if c.num_steps is None else {"num_steps": c.num_steps}
    if "num_steps" not in said:
        raise ValueError(f"{c.policy} does not say at how many steps it is evaluated: set env.frozen.num_steps")
    said = {"precision": "float32", "kernel": "ancestral"} | said  # the kernel is never asked
    frozen = replace(config, policy=PolicyConfig(field=c.policy, **said), env=replace(config.env, frozen=None))
    opened = opened_field(frozen, trust_code)
    assert opened is not None
    return policy_around(opened, frozen, trust_code)


def heldout_prompts(config: Config) -> Prompts:
    """What evaluation uses: its own file, or the held-out part of the training prompts."""
    return load_prompts(config.eval.prompts or config.env.prompts, "heldout", whole=config.eval.prompts is not None)


def _make_prompts(config: Config, policy: FlowPolicy, groups: Groups, trust_code: bool) -> VecEnv:
    field = policy.field.unguided
    with registry.located("env.prompts"):
        prompts = load_prompts(config.env.prompts, "train", whole=config.eval.prompts is not None)
        prompts.check(field.tokenize)
    with registry.located("env.prompts" if config.eval.prompts is None else "eval.prompts"):
        heldout_prompts(config).check(field.tokenize)
    field.settle()
    return PromptEnv(
        prompts,
        make_rewards(config, trust_code, field.frames),
        groups.num_rows,
        policy.event_shape,
        field.tokenize,
        field.decode,
        config.train.seed,
        videos=field.frames is not None,
    )
