"""What the numbers of a config may be, and which settings exclude each other; a message names the path and the fix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlflow import ranges, registry
from rlflow.config.steps import make_steps
from rlflow.config.stopping import check_rule

if TYPE_CHECKING:
    from rlflow.config.schema import Config
    from rlflow.rl.objectives.base import Objective

TAKEN = {"calls", "key", "caption_id"}
"""Names of what is kept of every evaluation of images beside its scores."""


def check_together(config: Config, trust_code: bool = False) -> None:
    """ValueError for settings that exclude each other."""
    OF_LEARNERS[config.algorithm.name](config, trust_code)
    _check_kind(config)
    _check_imitation(config, trust_code)
    check_sharding(config)
    _check_passes(config)
    judges = list(config.eval.metrics) if config.env.name == "prompt" else None
    for i, rule in enumerate(config.train.stop_when):
        check_rule(f"train.stop_when.{i}", rule, judges)
    if config.train.iterations is None and config.train.minutes is None:
        raise ValueError("train: give a budget, train.iterations=N or train.minutes=M")


def _check_unread(config: Config, likelihood: str, advantage: str) -> None:
    """ValueError for a likelihood or an advantage of a learner that reads none; the texts say why."""
    for path, usual, why in (("likelihood", "chain", likelihood), ("advantage", "group", advantage)):
        if registry.split_spec(path, getattr(config, path)) != (usual, {}):
            raise ValueError(f"{path}: algorithm={config.algorithm.name} does not read it ({why}); leave it out")


def _check_reward_gradient(config: Config, trust_code: bool) -> None:
    """ValueError for settings that reward gradients do not read, or that have none."""
    c: Any = config.algorithm
    _check_unread(config, "it has no ratio", "it has the reward's gradient")
    if config.env.name != "prompt":
        raise ValueError(
            "env.name: algorithm=reward_gradient needs rewards that it can differentiate; set it to prompt"
        )
    if config.reward.normalize != "none":
        raise ValueError("reward.normalize: algorithm=reward_gradient climbs the rewards themselves; set it to none")
    registry.build("through", "algorithm.through", c.through, trust_code=trust_code)


def _check_sac(config: Config, trust_code: bool) -> None:
    """ValueError for settings that off-policy learning does not read."""
    _check_critics(config)
    if registry.split_spec("steps", config.steps)[0] != "all":
        raise ValueError("steps: algorithm=sac differentiates through every denoising step; set steps=all")


def _check_flow_q(config: Config, trust_code: bool) -> None:
    """ValueError for settings that a policy extracted from critics does not read."""
    c: Any = config.algorithm
    _check_critics(config)
    if config.imitation is not None:
        raise ValueError("imitation: algorithm=flow_q keeps the rewards it stored: use sac, which pays anew")
    registry.build("extraction", "algorithm.extraction", c.extraction, trust_code=trust_code)


def _check_critics(config: Config) -> None:
    """ValueError for settings that a learner with critics of the data's actions does not read."""
    _check_unread(config, "it has no ratio", "it has critics")
    _check_replay(config)


def _check_replay(config: Config) -> None:
    """ValueError for what a learner with a replay does not do."""
    name = f"algorithm={config.algorithm.name}"
    if config.env.name == "prompt":
        raise ValueError(f"env.name: {name} learns in simulators, and env.name is prompt")
    if config.reward.normalize == "advantage":
        raise ValueError(
            f"reward.normalize: {name} has no advantages of the environment's rewards; set it to none or reward"
        )
    if config.reward.scale:
        raise ValueError(
            f"reward.scale: the replay of {name} would keep quotients of a std that still moves, early ones many "
            "times too large; leave it out, and weigh rewards against entropy by algorithm.alpha"
        )
    c: Any = config.algorithm
    if c.offline is not None and config.reward.weights:
        raise ValueError("algorithm.offline: its rewards are the simulator's own; leave reward.weights out")
    if c.offline is not None and config.env.frozen is not None:
        raise ValueError(
            "algorithm.offline: demonstrations hold actions, and around env.frozen the learner does something else; "
            "leave one of the two out"
        )


def _check_ogpo(config: Config, trust_code: bool) -> None:
    """ValueError for settings that chains paid by a critic do not read, or that exclude each other."""
    _check_replay(config)
    c: Any = config.algorithm
    if registry.split_spec("advantage", config.advantage)[0] != "group":
        raise ValueError("advantage: algorithm=ogpo compares the chains of one state with each other; set it to group")
    if c.chain.num_minibatches > c.states:
        raise ValueError(
            f"algorithm.chain.num_minibatches: {c.chain.num_minibatches} is more than algorithm.states = {c.states}, "
            "and a minibatch takes whole states"
        )
    likelihood = registry.build("likelihood", "likelihood", config.likelihood, trust_code=trust_code)
    objective = registry.build(
        "objective", "algorithm.chain.objective", c.chain.objective, {"likelihood": likelihood}, trust_code
    )
    _check_objective_steps(config, objective, trust_code)


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
    likelihood = registry.build("likelihood", "likelihood", config.likelihood, trust_code=trust_code)
    objective = registry.build("objective", "algorithm.objective", c.objective, {"likelihood": likelihood}, trust_code)
    _check_objective_steps(config, objective, trust_code)
    if name == "group" and c.critic_warmup and not objective.has_critic:
        raise ValueError("algorithm.critic_warmup: group advantages have no critic; set it to 0, or advantage=gae")
    if config.env.name == "prompt" and c.num_minibatches > config.env.num_groups:
        raise ValueError(
            f"algorithm.num_minibatches: {c.num_minibatches} is more than "
            f"env.num_groups = {config.env.num_groups}, and a minibatch takes whole groups"
        )
    if isinstance(config.advantage, dict) and name == "gae" and "gamma" in config.advantage:
        raise ValueError("advantage.gamma: the discount, of a primitive step, is env.gamma: set it there")
    if name == "group" and config.env.mode == "steps":
        raise ValueError("env.mode: group advantages compare whole episodes; set env.mode=episodes, or advantage=gae")


OF_LEARNERS = {
    "policy_gradient": _check_policy_gradient,
    "sac": _check_sac,
    "flow_q": _check_flow_q,
    "ogpo": _check_ogpo,
    "reward_gradient": _check_reward_gradient,
}


def check_sharding(config: Config) -> None:
    """ValueError where the number of network passes depends on what happens in a process."""
    if config.train.sharding == "full" and (config.env.name != "prompt" or config.algorithm.name != "policy_gradient"):
        raise ValueError(
            "train.sharding: processes that hold parts of one network must call it equally often, as with images "
            "and policy_gradient; set it to replicated"
        )


def _check_passes(config: Config) -> None:
    """ValueError where passes cannot be sized by what a run of them costs."""
    c = config.train
    if c.passes == "given":
        if c.passes_gib is not None:
            raise ValueError("train.passes_gib: is of train.passes=auto; set that, or leave it out")
        return
    if config.algorithm.name != "policy_gradient":
        raise ValueError(
            f"train.passes: auto sizes sampling and scoring, and algorithm={config.algorithm.name} scores nothing "
            "apart; set it to given"
        )
    if c.sharding == "full":
        raise ValueError("train.passes: a pass alone waits for the other processes of sharding=full; set it to given")


def _check_imitation(config: Config, trust_code: bool) -> None:
    """ValueError for a learned reward where there is no place for one."""
    if config.imitation is None:
        return
    if config.env.name == "prompt":
        raise ValueError("imitation: rewards are learnt in simulators, and env.name is prompt; leave it out")
    if config.reward.weights:
        raise ValueError("imitation: is the reward; leave reward.weights out")
    if config.env.frame_stack > 1:
        raise ValueError("imitation: demonstrations hold single observations; use env.frame_stack=1")
    registry.validate("ratio", "imitation.ratio", config.imitation.ratio, ("num_inputs",), trust_code)


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
            ("env.targets", config.env.targets, None),
            ("env.frozen", config.env.frozen, None),
            ("reward.scale", config.reward.scale, False),
            ("eval.train_mode", config.eval.train_mode, False),
        ):
            if value != usual:
                raise ValueError(f"{path}: is of simulators, and env.name is prompt; leave it at {usual!r}")
    elif config.env.targets is not None and config.env.frame_stack > 1:
        raise ValueError("env.targets: is shown beside single observations; use env.frame_stack=1")
    elif config.eval.metrics:
        raise ValueError("eval.metrics: judges images; episodes have return, length and success: leave it {}")


def check(config: Config, trust_code: bool = False) -> None:
    """Everything that can be known without loading a network; ValueError with the path and the fix."""
    from rlflow.flow.solvers import check_solver

    with registry.located("env.name"):
        registry.find("env", config.env.name, trust_code)
    ranges.check("", type(config), config)
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
            made = registry.build(kind, path, spec, supplied, trust_code)
            if kind == "solver":
                with registry.located(path):
                    check_solver(made)
    if config.policy.guidance is not None:
        registry.validate("guidance", "policy.guidance", config.policy.guidance, ("field",), trust_code)
    check_select(config, trust_code)
    _check_rewards(config, trust_code)
    _check_field(config, trust_code)
    if config.env.name != "prompt":
        spec = {**config.env.settings, "name": config.env.name}
        registry.validate("env", "env.settings", spec, ("num_envs", "gamma"), trust_code)
    if config.env.frozen is not None:
        registry.validate("steering", "env.frozen.steering", config.env.frozen.steering, ("flow",), trust_code)
    steps = make_steps(config, trust_code)
    with registry.located("steps"):
        steps.possible(config.policy.num_steps)


def _check_objective_steps(config: Config, objective: Objective, trust_code: bool) -> None:
    """The plan of the first iteration, on an even grid, shows which columns an objective gets."""
    import torch

    steps, num = make_steps(config, trust_code), config.policy.num_steps
    with registry.located("steps"):
        plan = steps(0, torch.linspace(0, 1, num + 1, dtype=torch.float64), torch.arange(config.env.group_size))
        objective.check_steps(plan)


def _check_rewards(config: Config, trust_code: bool) -> None:
    """Every reward asked for exists, with settings it has; no settings lie about."""
    from rlflow.rewards.component import check_reward, check_unused

    for name in TAKEN & config.eval.metrics.keys():
        raise ValueError(f"eval.metrics: {name!r} is a column that every evaluation has: call this one otherwise")
    weights, metrics = list(config.reward.weights), list(config.eval.metrics.values())
    for section, names in (("reward.weights", weights), ("eval.metrics", metrics)):
        for name in names:
            check_reward(section, name, config.reward.settings, trust_code)
    check_unused(config.reward.settings, [*weights, *metrics, *select_rewards(config)])


def select_rewards(config: Config) -> list[str]:
    """The reward that chooses among samples, if one does."""
    select = config.policy.select
    if not isinstance(select, dict) or config.env.name != "prompt" or "scorer" not in select:
        return []
    return [registry.split_spec("policy.select.scorer", select["scorer"])[0]]


def check_select(config: Config, trust_code: bool = False) -> None:
    """ValueError for a choice among samples that cannot be made: without a scorer, or with one of another world."""
    from rlflow.rewards.component import check_reward

    if config.policy.select is None:
        return
    path = "policy.select.scorer"
    name, settings = registry.split_spec("policy.select", config.policy.select)
    if "scorer" not in settings:
        raise ValueError(f"{path}: {name} needs one: name a reward (images), or a critic (robots)")
    spec = settings.pop("scorer")
    registry.validate("select", "policy.select", {"name": name, **settings}, ("scorer", "called"), trust_code)
    scorer, own = registry.split_spec(path, spec)
    if config.env.name != "prompt":
        registry.validate("scorer", path, spec, ("event_shape", "trust_code", "field"), trust_code)
        if config.eval.noise == "zero":
            raise ValueError(
                "eval.noise: chains that start at zero end alike: set it to random or fixed, or select=null"
            )
        return
    if own:
        raise ValueError(f"{path}: is a reward's name; its settings are of reward.settings.{scorer}")
    check_reward(path, scorer, config.reward.settings, trust_code)


def _check_field(config: Config, trust_code: bool) -> None:
    """The settings of a network that is made, or of a pipeline; what the simulator shows is told to it later."""
    from rlflow.models.scratch import TOLD

    spec = config.policy.field
    if isinstance(spec, str) and spec not in registry.TABLE["model"]:
        return  # a checkpoint
    name, _ = registry.split_spec("policy.field", spec)
    with registry.located("policy.field"):
        found = registry.settings(registry.find("model", name, trust_code))
    if "checkpoint" in found or config.env.name != "prompt":
        registry.validate("model", "policy.field", spec, () if "checkpoint" in found else TOLD, trust_code)
