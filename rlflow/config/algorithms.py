"""Sections of algorithms: one dataclass for each learner, and which of them a recipe's `algorithm` is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Tag

from rlflow.ranges import (
    STRICT,
    BelowOne,
    Count,
    LearningRate,
    LimitOrZero,
    Natural,
    NotNegative,
    Positive,
    Range,
    Share,
    Size,
    Spec,
    Unit,
)


@dataclass
class KLConfig:
    """Distance to the reference (the un-tuned policy)."""

    __pydantic_config__ = STRICT
    beta: NotNegative = 0.0
    kind: Literal["exact", "velocity", "released"] = "exact"


@dataclass
class OptimizerConfig:
    """AdamW; warmup in optimiser steps."""

    __pydantic_config__ = STRICT
    lr: LearningRate = 2e-4
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    weight_decay: NotNegative = 0.0
    eps: Positive = 1e-8
    max_grad_norm: LimitOrZero = 1.0
    warmup: Natural = 8
    cosine: bool = False
    final: Unit = 0.1
    max_bad_steps: Count = 5


@dataclass
class AlgorithmConfig:
    """Descent of an objective of recorded evidence."""

    __pydantic_config__ = STRICT
    sizes: ClassVar = ("algorithm.micro_batch",)  # settings that the memory of an update grows with
    name: Literal["policy_gradient"] = "policy_gradient"
    objective: Spec = "clip"
    epochs: Count = 1
    num_minibatches: Count = 1
    micro_batch: Count = 96
    kl: KLConfig = field(default_factory=KLConfig)
    norm_guard: NotNegative = 0.0  # weight of the velocity's norm above the un-tuned policy's
    entropy: NotNegative = 0.0
    anchor: NotNegative = 0.0  # weight of the squared distance to the un-tuned policy's action from the same noise
    critic_steps: Count = 1  # optimiser steps of the critic per step of the policy
    critic_lr: LearningRate = 1e-3
    critic_width: Size = 128
    critic_warmup: Natural = 0  # first iterations, in which the critic learns alone
    ema_decay: BelowOne = 0.9
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def needs_reference(self) -> bool:
        """True where the un-tuned weights look at every scored pair, once an iteration."""
        return bool(self.kl.beta or self.norm_guard)


@dataclass
class OfflineConfig:
    """Demonstrations of an off-policy learner: cloned first, and part of every batch."""

    __pydantic_config__ = STRICT
    demos: str = "demos"  # folder; made by the shipped expert of the simulator if it is absent
    clone: Natural = 2000  # steps of flow matching before the first iteration
    updates: Natural = 0  # steps of the learner on the demonstrations alone, after that
    share: BelowOne = 0.5  # of every batch


@dataclass
class OffPolicyConfig:
    """What every learner with a replay and critics has."""

    __pydantic_config__ = STRICT
    sizes: ClassVar[tuple[str, ...]] = ("algorithm.batch_size", "algorithm.capacity")
    name: str = ""
    batch_size: Count = 256
    capacity: Count = 1_000_000  # decisions kept
    start: Natural = 5000  # decisions seen before the first optimiser step
    updates_per_step: Positive = 1.0  # optimiser steps of the critics per decision after that
    num_critics: Size = 2
    critic_lr: LearningRate = 3e-4
    critic_width: Size = 256
    critic_depth: Size = 2
    critic_norm: bool = True  # LayerNorm
    pessimism: Literal["min", "mean"] = "min"  # over the critics
    critic_subset: Size | None = None  # targets: the least of that many, drawn anew; the actor: the mean of all
    tau: Share = 0.005
    offline: OfflineConfig | None = None  # of every batch, beside the replay


@dataclass
class SACConfig(OffPolicyConfig):
    """With gradients through the whole chain."""

    name: Literal["sac"] = "sac"
    actor_every: Count = 1  # optimiser steps of the critic per one of the actor
    alpha: Positive = 0.2  # first temperature
    alpha_lr: NotNegative = 1e-3  # 0 keeps the temperature
    target_entropy: float | None = None  # of a path, nats per number; default: that of the noise's middle less 1/2
    anchor: NotNegative = 0.0  # weight of the squared distance to the action in the replay
    lr: LearningRate = 3e-4
    max_grad_norm: LimitOrZero = 0.0  # 0: no limit
    ema_decay: BelowOne = 0.9


@dataclass
class FlowQConfig(OffPolicyConfig):
    """With a flow that is cloned beside the policy, and a way from the critics to the policy that stays near it."""

    name: Literal["flow_q"] = "flow_q"
    extraction: Spec = "fql"
    actor_every: Count = 1
    lr: LearningRate = 3e-4  # of the policy, and of the cloned flow
    max_grad_norm: LimitOrZero = 0.0
    ema_decay: BelowOne = 0.9


@dataclass
class OGPOConfig(OffPolicyConfig):
    """The policy gradient of chains that an off-policy critic pays, at states of the replay."""

    sizes: ClassVar[tuple[str, ...]] = (*OffPolicyConfig.sizes, "algorithm.chain.micro_batch")
    name: Literal["ogpo"] = "ogpo"
    chain: AlgorithmConfig = field(default_factory=AlgorithmConfig)  # objective, epochs, optimizer, ...
    states: Count = 64  # of the replay, in an update of the chain
    copies: Annotated[int, Range("must be at least 2", 2, 65_536)] = 8  # chains of each, compared among themselves
    rounds: Count = 1  # updates of the chain an iteration
    warmup: Natural = 0  # optimiser steps of the critics before the chain's first
    conservative: bool = False  # advantages that every critic agrees with, 0 where they disagree about the sign
    start: Natural = 1000


@dataclass
class RewardGradientConfig:
    """Ascent of differentiable rewards through the sampler."""

    __pydantic_config__ = STRICT
    sizes: ClassVar = ("algorithm.micro_batch",)
    name: Literal["reward_gradient"]
    through: Spec = "last_n"
    micro_batch: Count = 48
    kl: NotNegative = 0.0  # weight of the squared distance to the un-tuned policy's velocity
    ema_decay: BelowOne = 0.9
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def algorithm_name(values: Any) -> str:
    """Which learner a section is of; policy_gradient where it does not say."""
    name = values.get("name", "policy_gradient") if isinstance(values, dict) else getattr(values, "name", "")
    return str(name)


AnyAlgorithm = Annotated[
    Annotated[AlgorithmConfig, Tag("policy_gradient")]
    | Annotated[SACConfig, Tag("sac")]
    | Annotated[FlowQConfig, Tag("flow_q")]
    | Annotated[OGPOConfig, Tag("ogpo")]
    | Annotated[RewardGradientConfig, Tag("reward_gradient")],
    Discriminator(algorithm_name),
]


LEARNERS: dict[str, Callable[[], AlgorithmConfig | SACConfig | FlowQConfig | OGPOConfig | RewardGradientConfig]] = {
    "policy_gradient": AlgorithmConfig,
    "sac": SACConfig,
    "flow_q": FlowQConfig,
    "ogpo": OGPOConfig,
    "reward_gradient": lambda: RewardGradientConfig("reward_gradient"),
}
"""Default settings by the learner's name."""
