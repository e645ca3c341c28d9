"""What evaluates a policy, and how a checkpoint says that it is evaluated."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rlflow import registry
from rlflow.assembly.environment import acted_in, heldout_prompts, make_simulator
from rlflow.assembly.rewards import make_judge, make_judges, short_name
from rlflow.config.limits import select_rewards
from rlflow.config.schema import Config, RewardConfig
from rlflow.config.steps import make_steps
from rlflow.envs.prompts import Prompts
from rlflow.evaluation.episodes import EpisodeEvaluator
from rlflow.evaluation.images import Evaluator
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.select import Select
from rlflow.rewards.scorer import RewardScorer

NOT_THE_WORLD = ("chunk", "threads")
"""Settings of simulators that change how they are acted in, and not what they are: their episodes are compared."""

WORLD = ("name", "settings", "targets")


def make_select(config: Config, policy: FlowPolicy, trust_code: bool = False, prompts: Prompts | None = None) -> Select:
    """What `policy.select` says: one sample of each row, or the best of several by a reward or a critic."""
    if config.policy.select is None:
        return Select()
    name, settings = registry.split_spec("policy.select", config.policy.select)
    path, spec = "policy.select.scorer", settings.pop("scorer")
    called, _ = registry.split_spec(path, spec)
    if config.env.name == "prompt":
        frames, columns = policy.field.frames, None if prompts is None else prompts.columns
        judge = make_judge(short_name(called), called, config, trust_code, frames)
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
