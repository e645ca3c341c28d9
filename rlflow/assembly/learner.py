"""From the `algorithm` section of a config to a learner: one maker per learner, chosen by the section's type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlflow import registry
from rlflow.config.algorithms import (
    AlgorithmConfig,
    FlowQConfig,
    OfflineConfig,
    OffPolicyConfig,
    OGPOConfig,
    RewardGradientConfig,
    SACConfig,
)
from rlflow.config.schema import Config
from rlflow.config.steps import make_steps
from rlflow.envs.base import VecEnv
from rlflow.envs.demos.dataset import Demos
from rlflow.envs.prompt import PromptEnv
from rlflow.flow.policy import FlowPolicy
from rlflow.pretrain.cloning import demos_of
from rlflow.rl.algorithm import Algorithm
from rlflow.rl.groups import Groups
from rlflow.rl.imitation.learned import Fitting, Imitated, LearnedReward, check_numbers
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.rl.learners.regularizers import KL
from rlflow.rl.learners.reward_gradient import RewardGradient
from rlflow.rl.likelihoods.base import Likelihood
from rlflow.rl.off_policy.actor import ActorSettings
from rlflow.rl.off_policy.flow_q import FlowQ
from rlflow.rl.off_policy.learner import OffPolicySettings
from rlflow.rl.off_policy.offline import Offline, offline_data
from rlflow.rl.off_policy.ogpo import OGPO, Imagined
from rlflow.rl.off_policy.replay import Replay
from rlflow.rl.off_policy.sac import SAC
from rlflow.rl.off_policy.twin import TwinSettings
from rlflow.rl.optim import AdamW


def make_likelihood(config: Config, trust_code: bool = False) -> Likelihood | None:
    """How the rollout's samples are scored; None for a learner without ratios."""
    if not isinstance(config.algorithm, AlgorithmConfig):
        return None
    found: Likelihood = registry.build("likelihood", "likelihood", config.likelihood, trust_code=trust_code)
    return found


def make_algorithm(
    config: Config,
    policy: FlowPolicy,
    likelihood: Likelihood | None,
    groups: Groups,
    env: VecEnv,
    trust_code: bool = False,
) -> Algorithm:
    """The learner of a config, with weights of its own from the run's seed."""
    torch.manual_seed(config.train.seed)
    return MAKERS[type(config.algorithm)](config, policy, likelihood, groups, env, trust_code)


def _policy_gradient(
    config: Config, policy: FlowPolicy, likelihood: Likelihood | None, groups: Groups, env: VecEnv, trust_code: bool
) -> PolicyGradient:
    c = config.algorithm
    assert isinstance(c, AlgorithmConfig)
    assert likelihood is not None
    return _chain(c, "algorithm", config, policy, likelihood, groups, trust_code)


def _chain(
    c: AlgorithmConfig,
    path: str,
    config: Config,
    policy: FlowPolicy,
    likelihood: Likelihood,
    groups: Groups,
    trust_code: bool,
) -> PolicyGradient:
    """The learner of the section `c`, which stands at `path`."""
    return PolicyGradient(
        policy,
        likelihood,
        registry.build("advantage", "advantage", config.advantage, {"gamma": config.env.gamma}, trust_code),
        groups,
        objective=registry.build("objective", f"{path}.objective", c.objective, {"likelihood": likelihood}, trust_code),
        optimizer=AdamW(**dataclasses.asdict(c.optimizer)),
        epochs=c.epochs,
        num_minibatches=c.num_minibatches,
        micro_batch=c.micro_batch,
        kl=KL(c.kl.beta, c.kl.kind),
        norm_guard=c.norm_guard,
        entropy=c.entropy,
        anchor=c.anchor,
        critic_steps=c.critic_steps,
        critic_lr=c.critic_lr,
        critic_width=c.critic_width,
        critic_warmup=c.critic_warmup,
        ema_decay=c.ema_decay,
        seed=config.train.seed,
    )


def _sac(
    config: Config, policy: FlowPolicy, likelihood: Likelihood | None, groups: Groups, env: VecEnv, trust_code: bool
) -> SAC:
    c = config.algorithm
    assert isinstance(c, SACConfig)
    with registry.located("algorithm"):
        return SAC(
            policy,
            make_steps(config, trust_code),
            Replay(c.capacity, config.env.gamma),
            _off_policy(config, c, policy),
            _actor(c),
            alpha=c.alpha,
            alpha_lr=c.alpha_lr,
            target_entropy=c.target_entropy,
            anchor=c.anchor,
            relabel=env.learned.relabel if isinstance(env, Imitated) else None,
        )


def _flow_q(
    config: Config, policy: FlowPolicy, likelihood: Likelihood | None, groups: Groups, env: VecEnv, trust_code: bool
) -> FlowQ:
    c = config.algorithm
    assert isinstance(c, FlowQConfig)
    extraction = registry.build("extraction", "algorithm.extraction", c.extraction, trust_code=trust_code)
    with registry.located("algorithm"):
        return FlowQ(
            policy,
            make_steps(config, trust_code),
            Replay(c.capacity, config.env.gamma),
            extraction,
            _off_policy(config, c, policy),
            _actor(c),
        )


def _ogpo(
    config: Config, policy: FlowPolicy, likelihood: Likelihood | None, groups: Groups, env: VecEnv, trust_code: bool
) -> OGPO:
    c = config.algorithm
    assert isinstance(c, OGPOConfig)
    of_chains = registry.build("likelihood", "likelihood", config.likelihood, trust_code=trust_code)
    chain = _chain(c.chain, "algorithm.chain", config, policy, of_chains, Groups(c.states, c.copies), trust_code)
    with registry.located("algorithm"):
        return OGPO(
            chain,
            make_steps(config, trust_code),
            Replay(c.capacity, config.env.gamma),
            _off_policy(config, c, policy),
            Imagined(c.states, c.copies, c.rounds, c.warmup, c.conservative),
        )


def _reward_gradient(
    config: Config, policy: FlowPolicy, likelihood: Likelihood | None, groups: Groups, env: VecEnv, trust_code: bool
) -> RewardGradient:
    c = config.algorithm
    assert isinstance(c, RewardGradientConfig)
    assert isinstance(env, PromptEnv)
    with registry.located("reward.weights"):
        env.rewards.check_graded()
    with registry.located("algorithm"):
        return RewardGradient(
            policy,
            make_steps(config, trust_code),
            groups,
            env.graded,
            registry.build("through", "algorithm.through", c.through, trust_code=trust_code),
            optimizer=AdamW(**dataclasses.asdict(c.optimizer)),
            micro_batch=c.micro_batch,
            kl=c.kl,
            ema_decay=c.ema_decay,
            seed=config.train.seed,
            permute=config.train.permute_rewards,
        )


def imitated(config: Config, env: VecEnv, place: torch.device, trust_code: bool = False) -> VecEnv:
    """`env` with the learned reward of the config, on device `place`; as it is where there is none."""
    c = config.imitation
    if c is None:
        return env
    with registry.located("imitation"):
        found = demos_of(config.env.name, Path(c.demos), config.env.settings)
        if len(found.episodes) < c.episodes:
            told = f"{c.demos} has {len(found.episodes)}, fewer than {c.episodes}"
            raise registry.SettingError("episodes", told)
        demos = Demos(found.folder, found.about, found.shards, found.episodes[: c.episodes])
        data, whole = offline_data(demos, env.action_shape[0], config.env.gamma, place)
        expert = data.index(whole)
        check_numbers(expert.obs)
        torch.manual_seed(config.train.seed)
        inputs = {"num_inputs": LearnedReward.num_inputs(expert, c.inputs)}
        ratio = registry.build("ratio", "ratio", c.ratio, inputs, trust_code)
        fitting = Fitting(c.fits, c.batch_size, c.lr, c.memory, c.smooth, c.shift)
        learned = LearnedReward(ratio, expert, c.inputs, fitting, place, config.train.seed)
    return Imitated(env, learned, c.every or config.env.horizon or env.horizon)


def _off_policy(config: Config, c: OffPolicyConfig, policy: FlowPolicy) -> OffPolicySettings:
    """What every learner with a replay is made of."""
    return OffPolicySettings(
        c.batch_size,
        c.start,
        c.updates_per_step,
        twin_settings(c),
        _offline(config, c.offline, policy),
        config.train.seed,
        config.train.permute_rewards,
    )


def _actor(c: SACConfig | FlowQConfig) -> ActorSettings:
    """How one moves that climbs the critics."""
    return ActorSettings(AdamW(lr=c.lr, betas=(0.9, 0.999), max_grad_norm=c.max_grad_norm), c.actor_every, c.ema_decay)


def twin_settings(c: OffPolicyConfig) -> TwinSettings:
    """The critics of a config."""
    return TwinSettings(
        c.num_critics, c.critic_width, c.critic_depth, c.critic_norm, c.tau, c.critic_lr, c.pessimism, c.critic_subset
    )


def _offline(config: Config, c: OfflineConfig | None, policy: FlowPolicy) -> Offline | None:
    """Demonstrations of the config's simulator as decisions of its chunk."""
    if c is None:
        return None
    with registry.located("offline"):
        if config.env.frame_stack > 1:
            raise ValueError("demonstrations hold single observations: use env.frame_stack=1")
        demos = demos_of(config.env.name, Path(c.demos), config.env.settings)
        data, whole = offline_data(demos, policy.event_shape[0], config.env.gamma, policy.device)
        return Offline(data, whole, c.clone, c.updates, c.share)


MAKERS: dict[type, Callable[..., Any]] = {
    AlgorithmConfig: _policy_gradient,
    SACConfig: _sac,
    FlowQConfig: _flow_q,
    OGPOConfig: _ogpo,
    RewardGradientConfig: _reward_gradient,
}
