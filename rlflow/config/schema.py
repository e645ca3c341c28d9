"""What a recipe may say: one dataclass for each section; comments say what a setting is for.

A section that picks a component is a name, or `name: ...` with its settings; the component's own
signature is the schema.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Discriminator, Tag

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
    num_steps: int = 8
    guidance: Spec | None = None
    squash: Literal["identity", "tanh"] = "identity"
    precision: Literal["float32", "bfloat16", "float64"] = "bfloat16"  # of the network; the chain is at least float32
    grad_checkpointing: bool = False
    offload_reference: bool = False  # the reference weights stay in host memory between their passes
    max_kappa: float = 5.0


@dataclass
class KLConfig:
    """Distance to the reference (the un-tuned policy)."""

    __pydantic_config__ = STRICT
    beta: float = 0.0
    kind: Literal["exact", "velocity", "released"] = "exact"


@dataclass
class OptimizerConfig:
    """AdamW; warmup in optimiser steps."""

    __pydantic_config__ = STRICT
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    warmup: int = 8
    cosine: bool = False
    final: float = 0.1
    max_bad_steps: int = 5


@dataclass
class NFTConfig:
    """DiffusionNFT's loss in place of the clipped ratio; the weights that sample follow the live ones."""

    __pydantic_config__ = STRICT
    beta: float = 1.0  # b: how far the two branches stand from the sampling weights' velocity
    clip: float = 5.0  # advantage at which a sample counts as wholly good or bad
    old_rate: float = 0.001  # the sampling weights keep min(old_rate x iteration, old_max) of themselves
    old_max: float = 0.5


@dataclass
class AlgorithmConfig:
    """The clipped policy gradient."""

    __pydantic_config__ = STRICT
    name: Literal["policy_gradient"] = "policy_gradient"
    clip_low: float = 2e-3
    clip_high: float | None = None
    trust_region: Literal["clip", "spo", "aspo"] = "clip"  # what holds the ratio near 1
    epochs: int = 1
    num_minibatches: int = 1
    micro_batch: int = 96
    kl: KLConfig = field(default_factory=KLConfig)
    guard: bool = False
    entropy: float = 0.0
    target_kl: float | None = None
    anchor: float = 0.0  # weight of the squared distance to the un-tuned policy's action from the same start noise
    denoising_gamma: float = 1.0  # each earlier denoising step counts this much less (DPPO)
    clip_base: float | None = None  # clip of the noisiest step, growing to clip_low and clip_high at the last (DPPO)
    nft: NFTConfig | None = None  # its loss in place of the ratio's
    critic_steps: int = 1  # optimiser steps of the critic per step of the policy
    critic_lr: float = 1e-3
    critic_width: int = 128
    critic_warmup: int = 0  # first iterations, in which the critic learns alone
    ema_decay: float = 0.9
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class OfflineConfig:
    """Demonstrations of an off-policy learner: cloned first, and part of every batch."""

    __pydantic_config__ = STRICT
    demos: str = "demos"  # folder; made by the shipped expert of the simulator if it is absent
    clone: int = 2000  # steps of flow matching before the first iteration
    updates: int = 0  # steps of the learner on the demonstrations alone, after that
    share: float = 0.5  # of every batch


@dataclass
class SACConfig:
    """Off-policy, with gradients through the whole chain; a replay of its own."""

    __pydantic_config__ = STRICT
    name: Literal["sac"]
    batch_size: int = 256
    capacity: int = 1_000_000  # decisions kept
    start: int = 5000  # decisions seen before the first optimiser step
    updates_per_step: float = 1.0  # optimiser steps per decision after that
    n_step: int = 1  # decisions ahead of which the target is made
    actor_every: int = 1  # optimiser steps of the critic per one of the actor
    alpha: float = 0.2  # first temperature
    alpha_lr: float = 1e-3  # 0 keeps the temperature
    target_entropy: float | None = None  # of a path, nats per number; default: that of the noise's middle less 1/2
    anchor: float = 0.0  # weight of the squared distance to the action in the replay
    offline: OfflineConfig | None = None
    num_critics: int = 2
    critic_lr: float = 3e-4
    critic_width: int = 256
    critic_depth: int = 2
    critic_norm: bool = True  # LayerNorm
    pessimism: Literal["min", "mean"] = "min"  # over the critics
    tau: float = 0.005
    lr: float = 3e-4
    max_grad_norm: float = 0.0  # 0: no limit
    ema_decay: float = 0.9


def algorithm_name(values: Any) -> str:
    """Which learner a section is of; policy_gradient where it does not say."""
    name = values.get("name", "policy_gradient") if isinstance(values, dict) else getattr(values, "name", "")
    return str(name)


AnyAlgorithm = Annotated[
    Annotated[AlgorithmConfig, Tag("policy_gradient")] | Annotated[SACConfig, Tag("sac")],
    Discriminator(algorithm_name),
]


@dataclass
class EnvConfig:
    """What is acted in."""

    __pydantic_config__ = STRICT
    name: str = "prompt"
    settings: dict[str, Any] = field(default_factory=dict)  # of a simulator: chunk, threads, id, ...
    prompts: str = "scenes"  # PromptEnv: scenes, scenes:pair, words, geneval, signs, or a file
    num_groups: int = 6
    group_size: int = 16
    rows_per_call: int = 96
    shared_noise: bool = False
    gamma: float = 0.99  # discount of a primitive step: inside chunks, in reward.scale and in advantage=gae
    horizon: int | None = None  # steps (chunks) of an iteration; default: the longest episode
    mode: Literal["episodes", "steps"] = "episodes"  # steps: episodes run on from one iteration to the next
    frame_stack: int = 1


@dataclass
class RewardConfig:
    """Rewards by name with their weights; weight 0 logs without training on it. A simulator without any has its own."""

    __pydantic_config__ = STRICT
    weights: dict[str, float] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # by reward: model, device, url, ...
    normalize: Literal["none", "reward", "advantage"] = "none"
    scale: bool = False  # divided by the running std of the discounted return (simulators)
    timeout_s: float = 60.0


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
class TrainConfig:
    """Budget, seed and the run folder's habits."""

    __pydantic_config__ = STRICT
    iterations: int | None = None
    minutes: float | None = None  # of training; evaluation is not counted
    seed: int = 0
    threads: int | None = None
    permute_rewards: bool = False  # the control: rewards shuffled across the batch, of SAC across the replay
    sharding: Literal["replicated", "full"] = "replicated"  # full: processes hold parts of the network (FSDP2)
    checkpoint_every: int = 50
    keep: int = 3
    tensorboard: bool = True
    wandb: WandbConfig | None = None  # true: with these defaults


@dataclass
class EvalConfig:
    """Held-out evaluation with the deployment sampler (no noise)."""

    __pydantic_config__ = STRICT
    prompts: str | None = None  # default: the held-out split of env.prompts
    metrics: dict[str, str] = field(default_factory=dict)  # of images: rewards by display name
    num: int = 500  # images, or episodes
    noise: Literal["random", "fixed", "zero"] = "random"  # the chains' starts in episodes; fixed: one for all steps
    train_mode: bool = False  # episodes: all of them again with the noise of training, as train_success, ...
    every: int = 0  # iterations; 0 evaluates at the start and at the end only
    num_steps: int | None = None  # default: policy.num_steps
    resolution: int | None = None  # of a pretrained model's pictures; default: the one it trains at
    solver: Spec | None = None  # default: policy.solver
    weights: Literal["live", "ema"] = "ema"
    seed: int = 0
    rows_per_call: int = 100
    grid: int = 32  # images in the picture
    video: int | None = None  # episodes filmed; default: two where the simulator draws pictures


@dataclass
class Config:
    """A whole run."""

    __pydantic_config__ = STRICT
    about: str = ""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    steps: Spec = "all_but_last"
    likelihood: Spec = "chain"
    advantage: Spec = "group"
    algorithm: AnyAlgorithm = field(default_factory=AlgorithmConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML-able values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_yaml(self) -> str:
        """The resolved config; reading it again gives the same run."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)
