"""What a recipe may say: one dataclass for each section (those of learners: algorithms.py); comments say what for.

A section that picks a component is a name, or `name: ...` with its settings; the component's own
signature is the schema.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from rlflow.config import plain
from rlflow.config.algorithms import AlgorithmConfig, AnyAlgorithm
from rlflow.ranges import (
    STRICT,
    Count,
    LearningRate,
    Limit,
    Natural,
    NotNegative,
    Positive,
    Seconds,
    Seed,
    Share,
    Size,
    Spec,
    Text,
)


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
