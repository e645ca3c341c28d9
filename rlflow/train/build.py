"""From a Config to live objects; the only place that knows both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from rlflow import registry
from rlflow.config.limits import select_rewards
from rlflow.config.processes import check_updates, share
from rlflow.config.schema import Config, PolicyConfig, RewardConfig
from rlflow.config.steps import make_steps
from rlflow.envs.base import VecEnv
from rlflow.envs.checked import Checked
from rlflow.envs.frozen import BasePolicy, Frozen, Steering
from rlflow.envs.prompt import PromptEnv
from rlflow.envs.prompts import Prompts, load_prompts
from rlflow.envs.targets import Targeted
from rlflow.envs.wrappers import Decoded, FrameStack, RewardScaling, RewardWrapper
from rlflow.evaluation.episodes import EpisodeEvaluator
from rlflow.evaluation.images import Evaluator
from rlflow.flow.field import VelocityField
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.select import Select
from rlflow.flow.squash import SQUASHES
from rlflow.models.freeze import freeze
from rlflow.models.hub import is_hub_id
from rlflow.models.io import embedded, load_field, read_config
from rlflow.models.pretrained.opening import is_pipeline
from rlflow.models.pretrained.pipeline import pretrained
from rlflow.models.scratch import make_field
from rlflow.parallel import dist, shards
from rlflow.parallel.dist import device
from rlflow.rewards.base import Reward, RewardSet
from rlflow.rewards.component import make_reward
from rlflow.rewards.frames import of_videos
from rlflow.rewards.scorer import RewardScorer
from rlflow.rl.algorithm import Algorithm
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.train.learners import imitated, make_algorithm, make_likelihood

NOT_THE_WORLD = ("chunk", "threads")
"""Settings of simulators that change how they are acted in, and not what they are: their episodes are compared."""
WORLD = ("name", "settings", "targets")
PRECISION = {"float32": None, "float64": None, "bfloat16": torch.bfloat16}


def make_policy(config: Config, trust_code: bool = False) -> FlowPolicy:
    """The un-tuned policy of a config, on this process's device."""
    torch.manual_seed(config.train.seed)  # the first weights of a toy field and of a noise net
    with registry.located("policy.field"):
        field = _make_field(config, trust_code)
    sharded = config.train.sharding == "full" and dist.world() > 1
    policy = policy_around(field, config, trust_code, torch.device("cpu") if sharded else None)
    if sharded:  # block by block: the whole network need not fit the device
        shards.shard(policy.field.unguided, device())
        policy.kernel.to(device())
    steps = make_steps(config, trust_code)
    with registry.located("steps"):
        policy.check_steps(steps, config.policy.max_kappa)
    return policy


def policy_around(
    field: VelocityField, config: Config, trust_code: bool = False, place: torch.device | None = None
) -> FlowPolicy:
    """The policy of a config around its network, on `place` or this process's device; its steps are not checked."""
    c, place = config.policy, place or device()
    if c.frozen is not None:
        with registry.located("policy.frozen"):
            freeze(field, c.frozen)
    if c.grad_checkpointing:
        field.grad_checkpointing = True
    if c.precision == "float64":
        field = field.double()
    field = field.to(place)
    shapes = {"num_features": field.num_features, "event_shape": tuple(field.event_shape)}
    kernel = registry.build("kernel", "policy.kernel", c.kernel, shapes, trust_code)
    kernel = kernel.to(place, torch.float64 if c.precision == "float64" else torch.float32)
    if c.guidance is not None:
        field = registry.build("guidance", "policy.guidance", c.guidance, {"field": field}, trust_code)
    policy = FlowPolicy(
        field,
        kernel,
        solver=registry.build("solver", "policy.solver", c.solver, trust_code=trust_code),
        grid=registry.build("grid", "policy.grid", c.grid, {"field": field.unguided}, trust_code),
        num_steps=c.num_steps,
        squash=SQUASHES[c.squash](),
        autocast=PRECISION[c.precision],
    )
    if c.offload_reference:
        policy.weights.places["ref"] = torch.device("cpu")
    return policy


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
    copy = policy_around(_make_field(config, trust_code=True), config, trust_code=True, place=torch.device("cpu"))
    copy.load_state_dict(state)
    yield copy.field.unguided


def _make_field(config: Config, trust_code: bool) -> VelocityField:
    """From a checkpoint, or from scratch to fit the simulator."""
    spec = config.policy.field
    if isinstance(spec, str) and spec not in registry.TABLE["model"]:
        return pretrained(spec) if is_pipeline(spec) or is_hub_id(spec) else load_field(spec, trust_code)
    name, _ = registry.split_spec("policy.field", spec)
    if "checkpoint" in registry.settings(registry.find("model", name, trust_code)):
        model: VelocityField = registry.build("model", "policy.field", spec, trust_code=trust_code)
        return model
    if config.env.name == "prompt":
        raise ValueError(
            f"a network from scratch makes no images: name one of {embedded()} or a checkpoint folder, or a simulator"
        )
    env = make_simulator(config, 1, trust_code)
    return make_field(spec, env.obs_spec, env.action_shape, trust_code)


def make_rewards(config: Config, trust_code: bool = False, frames: int | None = None) -> RewardSet:
    """The training rewards, of videos where `frames` says how many frames they have."""
    c = config.reward
    found = [Reward(_short(n), make_reward(n, c.settings, trust_code), w, c.timeout_s) for n, w in c.weights.items()]
    return RewardSet([_of_videos(r, config, frames) for r in found], c.normalize)


def make_judges(config: Config, trust_code: bool = False, frames: int | None = None) -> RewardSet:
    """The evaluation metrics under their display names."""
    return RewardSet([_judge(n, r, config, trust_code, frames) for n, r in config.eval.metrics.items()])


def _judge(name: str, reward: str, config: Config, trust_code: bool, frames: int | None) -> Reward:
    return _of_videos(Reward(name, make_reward(reward, config.reward.settings, trust_code), 1.0, 600.0), config, frames)


def _of_videos(reward: Reward, config: Config, frames: int | None) -> Reward:
    with registry.located("reward.frames"):
        return of_videos(reward, config.reward.frames, frames)


def _short(name: str) -> str:
    """Metric name of a reward: the function's own name for a dotted path."""
    return name.rpartition(":")[2].rpartition(".")[2]


def heldout_prompts(config: Config) -> Prompts:
    """What evaluation uses: its own file, or the held-out part of the training prompts."""
    return load_prompts(config.eval.prompts or config.env.prompts, "heldout", whole=config.eval.prompts is not None)


def make_select(config: Config, policy: FlowPolicy, trust_code: bool = False, prompts: Prompts | None = None) -> Select:
    """What `policy.select` says: one sample of each row, or the best of several by a reward or a critic."""
    if config.policy.select is None:
        return Select()
    name, settings = registry.split_spec("policy.select", config.policy.select)
    path, spec = "policy.select.scorer", settings.pop("scorer")
    called, _ = registry.split_spec(path, spec)
    if config.env.name == "prompt":
        frames, columns = policy.field.frames, None if prompts is None else prompts.columns
        judge = _judge(_short(called), called, config, trust_code, frames)
        with registry.located(path):
            scorer: Any = RewardScorer(judge, columns, frames is not None)
    else:
        told: dict[str, Any] = {"event_shape": tuple(policy.event_shape), "trust_code": trust_code}
        told["field"] = policy.field.unguided
        scorer = registry.build("scorer", path, spec, told, trust_code)
    supplied = {"scorer": scorer, "called": called}
    chosen: Select = registry.build("select", "policy.select", {"name": name, **settings}, supplied, trust_code)
    return chosen


def make_evaluator(config: Config, policy: FlowPolicy, trust_code: bool = False) -> Evaluator | EpisodeEvaluator:
    """What `eval` says, of images or of episodes."""
    c, prompts = config.eval, heldout_prompts(config) if config.env.name == "prompt" else None
    select = make_select(config, policy, trust_code, prompts)
    solver = None if c.solver is None else registry.build("solver", "eval.solver", c.solver, trust_code=trust_code)
    if prompts is not None:
        return Evaluator(
            policy,
            prompts,
            make_judges(config, trust_code, policy.field.frames),
            num=c.num,
            num_steps=c.num_steps,
            solver=solver,
            seed=c.seed,
            rows_per_call=c.rows_per_call,
            resolution=c.resolution,
            select=select,
        )
    return EpisodeEvaluator(
        policy,
        lambda num_envs: acted_in(make_simulator(config, num_envs, trust_code), policy),
        num=c.num,
        num_steps=c.num_steps,
        solver=solver,
        seed=c.seed,
        rows_per_call=c.rows_per_call,
        noise=c.noise,
        video=c.video,
        noisy=make_steps(config, trust_code) if c.train_mode else None,
        world=[config.env.name, {k: v for k, v in config.env.settings.items() if k not in NOT_THE_WORLD}],
        select=select,
    )


def judged_by(config: Config) -> dict[str, Any]:
    """The sections that evaluate a checkpoint as this config does, for its config.json."""
    c = config.eval
    deployed = {"num_steps": c.num_steps or config.policy.num_steps, "solver": c.solver or config.policy.solver}
    judged = {"prompts": c.prompts, "metrics": c.metrics, "num": c.num, "noise": c.noise, "resolution": c.resolution}
    policy = {name: getattr(config.policy, name) for name in ("guidance", "precision", "squash", "grid", "select")}
    env = {name: getattr(config.env, name) for name in (*WORLD, "prompts", "gamma", "frame_stack")}
    env |= {} if config.env.frozen is None else {"frozen": asdict(config.env.frozen)}
    asked = (*c.metrics.values(), *select_rewards(config))
    settings = {name: value for name, value in config.reward.settings.items() if name in asked}
    reward = ({"settings": settings} if settings else {}) | _unusual(config)
    judging = {"policy": policy, "env": env, "eval": judged | deployed}
    return judging | ({"reward": reward} if reward else {})


def _unusual(config: Config) -> dict[str, Any]:
    """Which frames judge a video, where that is not the default."""
    return {} if config.reward.frames == RewardConfig().frames else {"frames": config.reward.frames}


@dataclass
class Parts:
    """Everything a training loop holds."""

    policy: FlowPolicy
    collector: Collector
    algorithm: Algorithm
    groups: Groups


def make_parts(config: Config, trust_code: bool = False) -> Parts:
    """Policy, environment, collector and learner of this process."""
    groups = share(config, dist.rank(), dist.world())
    policy = make_policy(config, trust_code)
    env = _make_env(config, policy, groups, trust_code)
    likelihood = make_likelihood(config, trust_code)
    steps = make_steps(config, trust_code)
    horizon = config.env.horizon or env.horizon
    check_updates(config, groups, horizon)
    algorithm = make_algorithm(config, policy, likelihood, groups, env, trust_code)
    collector = Collector(
        env,
        policy,
        likelihood,
        steps,
        groups,
        seed=config.train.seed,
        horizon=horizon,
        mode=config.env.mode,
        rows_per_call=config.env.rows_per_call,
        sample_with=algorithm.sample_with,
        shared_noise=config.env.shared_noise,
        keep_path=algorithm.keep_path,
    )
    return Parts(policy, collector, algorithm, groups)


def _make_env(config: Config, policy: FlowPolicy, groups: Groups, trust_code: bool) -> VecEnv:
    if config.env.name == "prompt":
        return _make_prompts(config, policy, groups, trust_code)
    return acted_in(_make_task(config, policy, groups, trust_code), policy)


def acted_in(env: VecEnv, policy: FlowPolicy) -> VecEnv:
    """`env` as the policy's samples reach it: of a network with units of its own they are decoded first."""
    field = policy.field.unguided
    with registry.located("policy.field"):
        return Decoded(env, field.decode, policy.event_shape) if field.decodes_actions else env


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
    return policy_around(_make_field(frozen, trust_code), frozen, trust_code)


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
