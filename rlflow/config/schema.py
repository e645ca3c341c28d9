"""What a recipe may say: one dataclass for each section; comments say what a setting is for.

A section that picks a component is a name, or `name: ...` with its settings; the component's own
signature is the schema.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Tag

from rlflow.config import plain
from rlflow.ranges import (
    BelowOne,
    Count,
    LearningRate,
    Limit,
    LimitOrZero,
    Natural,
    NotNegative,
    Positive,
    Range,
    Seconds,
    Seed,
    Share,
    Size,
    Text,
    Unit,
)

Spec = str | dict[str, Any]
STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass
class PolicyConfig:
    """Which network, and the chain around it."""

    __pydantic_config__ = STRICT
    field: Spec = "shapes"  # an embedded checkpoint, a checkpoint folder, or a model from scratch
    frozen: str | None = None  # regular expression; parameters of the field in whose names it is found do not train
    kernel: Spec = "flow_sde"
    solver: Spec = "euler"
    grid: Spec = "uniform"
    num_steps: Size = 8
    guidance: Spec | None = None
    select: Spec | None = None  # of evaluation and deployment: best_of, num, scorer (a reward's name, or a critic)
    squash: Literal["identity", "tanh"] = "identity"
    precision: Literal["float32", "bfloat16", "float64"] = "bfloat16"  # of the network; the chain is at least float32
    grad_checkpointing: bool = False
    offload_reference: bool = False  # the reference weights stay in host memory between their passes
    max_kappa: Limit = 5.0


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


@dataclass
class SACConfig(OffPolicyConfig):
    """With gradients through the whole chain."""

    name: Literal["sac"] = "sac"
    actor_every: Count = 1  # optimiser steps of the critic per one of the actor
    alpha: Positive = 0.2  # first temperature
    alpha_lr: NotNegative = 1e-3  # 0 keeps the temperature
    target_entropy: float | None = None  # of a path, nats per number; default: that of the noise's middle less 1/2
    anchor: NotNegative = 0.0  # weight of the squared distance to the action in the replay
    offline: OfflineConfig | None = None
    lr: LearningRate = 3e-4
    max_grad_norm: LimitOrZero = 0.0  # 0: no limit
    ema_decay: BelowOne = 0.9


@dataclass
class FlowQConfig(OffPolicyConfig):
    """With a flow that is cloned beside the policy, and a way from the critics to the policy that stays near it."""

    name: Literal["flow_q"] = "flow_q"
    extraction: Spec = "fql"
    actor_every: Count = 1
    offline: OfflineConfig | None = None
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


@dataclass
class FrozenConfig:
    """A policy inside the environment whose weights never move, and what the learner does to it."""

    __pydantic_config__ = STRICT
    policy: Spec  # an embedded checkpoint, a folder (RUN/model), or a model with a checkpoint
    steering: Spec = "start_noise"  # start_noise (DSRL), or residual
    num_steps: Size | None = None  # default: those the checkpoint is evaluated at


@dataclass
class EnvConfig:
    """What is acted in."""

    __pydantic_config__ = STRICT
    name: str = "prompt"
    settings: dict[str, Any] = field(default_factory=dict)  # of a simulator: chunk, threads, id, ...
    prompts: str = "scenes"  # PromptEnv: scenes, scenes:pair, words, geneval, signs, or a file
    num_groups: Count = 6
    group_size: Count = 16
    rows_per_call: Count = 96
    shared_noise: bool = False
    gamma: Share = 0.99  # discount of a primitive step: inside chunks, in reward.scale and in advantage=gae
    horizon: Count | None = None  # steps (chunks) of an iteration; default: the longest episode
    mode: Literal["episodes", "steps"] = "episodes"  # steps: episodes run on from one iteration to the next
    frame_stack: Size = 1
    targets: list[float] | None = None  # returns that rows are asked for in turn, of policies that are told one
    frozen: FrozenConfig | None = None


@dataclass
class RewardConfig:
    """Rewards by name with their weights; weight 0 logs without training on it. A simulator without any has its own."""

    __pydantic_config__ = STRICT
    weights: dict[str, float] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # by reward: model, device, url, ...
    normalize: Literal["none", "reward", "advantage"] = "none"
    frames: int | list[int] = 4  # of a video that a reward of images sees: so many, or these, counted from 0 or -1
    scale: bool = False  # divided by the running std of the discounted return (simulators)
    timeout_s: Seconds = 60.0


@dataclass
class ImitationConfig:
    """A reward learnt from demonstrations, in place of the simulator's: minus a log density ratio."""

    __pydantic_config__ = STRICT
    demos: str = "demos"  # folder; made by the shipped expert of the simulator if it is absent
    episodes: Count = 1  # the first ones of the folder
    ratio: Spec = "cfil"
    inputs: Literal["state_action", "state", "next_state"] = "state_action"  # next_state: state and what was reached
    shift: float = 0.0  # added to the reward of every step; above 0, to live on pays
    every: Count | None = None  # steps of the environment between two fits; default: those of an iteration
    fits: Count = 50  # optimiser steps of each
    batch_size: Size = 256  # decisions of either side
    lr: LearningRate = 1e-3
    memory: Size = 8192  # newest decisions of the agent that are fitted to
    smooth: NotNegative = 0.05  # noise on what is fitted to, in standard deviations of the expert's


@dataclass
class WandbConfig:
    """Where the run goes on Weights & Biases."""

    __pydantic_config__ = STRICT
    project: str = "rlflow"
    entity: str | None = None  # user or team
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    name: str | None = None  # default: that of the run folder


@dataclass
class StopRule:
    """Ends a run whose metric, of any row, is below or above a number, or falls by one from its best."""

    __pydantic_config__ = STRICT
    metric: str
    below: float | None = None
    above: float | None = None
    falls: Positive | None = None


@dataclass
class TrainConfig:
    """Budget, seed and the run folder's habits."""

    __pydantic_config__ = STRICT
    iterations: Count | None = None
    minutes: Limit | None = None  # of training; evaluation is not counted
    stop_when: list[StopRule] = field(default_factory=list)  # one rule may stand without the list
    seed: Seed = 0
    threads: Size | None = None
    passes: Literal["given", "auto"] = "given"  # auto: env.rows_per_call and algorithm.micro_batch by throughput
    passes_gib: Limit | None = None  # of auto: what a pass may keep; default: half of what is free
    permute_rewards: bool = False  # the control: rewards shuffled across the batch, of SAC across the replay
    sharding: Literal["replicated", "full"] = "replicated"  # full: processes hold parts of the network (FSDP2)
    checkpoint_every: Count = 50
    keep: Count = 3
    tensorboard: bool = True
    report: bool = True  # report.html when the run ends; `rlflow report RUN` writes it at any time
    wandb: WandbConfig | None = None  # true: with these defaults


@dataclass
class EvalConfig:
    """Held-out evaluation with the deployment sampler (no noise)."""

    __pydantic_config__ = STRICT
    prompts: str | None = None  # default: the held-out split of env.prompts
    metrics: dict[str, str] = field(default_factory=dict)  # of images: rewards by display name
    num: Count = 500  # images, or episodes
    noise: Literal["random", "fixed", "zero"] = "random"  # the chains' starts in episodes; fixed: one for all steps
    train_mode: bool = False  # episodes: all of them again with the noise of training, as train_success, ...
    every: Natural = 0  # iterations; 0 evaluates at the start and at the end only
    num_steps: Size | None = None  # default: policy.num_steps
    resolution: Size | None = None  # of a pretrained model's pictures; default: the one it trains at
    solver: Spec | None = None  # default: policy.solver
    weights: Literal["live", "ema"] = "ema"
    seed: Seed = 0
    rows_per_call: Count = 100
    grid: Size = 32  # images in the picture
    video: Natural | None = None  # episodes filmed; default: two where the simulator draws pictures


@dataclass
class Config:
    """A whole run."""

    __pydantic_config__ = STRICT
    about: Text = ""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    steps: Spec = "all_but_last"
    likelihood: Spec = "chain"
    advantage: Spec = "group"
    algorithm: AnyAlgorithm = field(default_factory=AlgorithmConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    imitation: ImitationConfig | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML-able values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_yaml(self) -> str:
        """The resolved config; reading it again gives the same run."""
        return plain.dump(self.to_dict())
