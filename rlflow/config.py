"""The configuration of a run: plain YAML sections, checked completely before anything starts.

A section that picks a component is a name, or `name: ...` with its settings; the component's own
signature is the schema. Unknown keys, wrong types and impossible combinations are errors that name the
full path, the reason and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Discriminator, Tag, TypeAdapter, ValidationError

from rlflow import registry
from rlflow.limits import check
from rlflow.registry import nearest
from rlflow.values import merge, read_yaml, set_value

__all__ = ["merge", "read_yaml", "set_value"]
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


def _algorithm_name(values: Any) -> str:
    name = values.get("name", "policy_gradient") if isinstance(values, dict) else getattr(values, "name", "")
    return str(name)


AnyAlgorithm = Annotated[
    Annotated[AlgorithmConfig, Tag("policy_gradient")] | Annotated[SACConfig, Tag("sac")],
    Discriminator(_algorithm_name),
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
    wandb: bool = False


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


MAY_CHANGE_ON_RESUME = (
    "about",
    "train.iterations",
    "train.minutes",
    "train.checkpoint_every",
    "train.keep",
    "train.tensorboard",
    "train.wandb",
    "train.threads",
    "train.sharding",
    "eval.every",
    "eval.metrics",
    "eval.grid",
    "eval.rows_per_call",
    "algorithm.micro_batch",
    "env.rows_per_call",
    "env.settings.threads",
    "eval.video",
    "reward.settings.*.url",  # a server may have moved
    "reward.settings.*.device",
    "reward.settings.*.offload",
)


def _field_names(cls: type, path: Sequence[Any]) -> list[str]:
    """Valid keys of the section at `path`."""
    found: list[Any] = [cls]
    for part in path:
        hints = [hint for c in found if (hint := typing.get_type_hints(c).get(part)) is not None]
        members = [m for hint in hints for m in typing.get_args(hint) or (hint,)]
        found = [m for m in members if dataclasses.is_dataclass(m)]
    return list(dict.fromkeys(f.name for c in found for f in dataclasses.fields(c)))


def _elsewhere(name: str) -> str:
    """'; did you mean train.seed?' where a section has the setting that was looked for at the top."""
    found = [f"{section}.{name}" for section in _field_names(Config, []) if name in _field_names(Config, [section])]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        loc = [part for part in item["loc"] if not str(part).endswith("]")]  # less the member of a union
        if loc[0] == "algorithm" and len(loc) > 2:
            loc.pop(1)  # less the algorithm's name
        loc = loc[:-1] if len(loc) > 1 and loc[-1] == "str" else loc
        path = ".".join(str(p) for p in loc)
        of_spec = item["loc"][-1] == "str" or str(item["loc"][-1]).startswith("dict[")  # the member of that union
        if item["type"] == "union_tag_invalid" and isinstance(item["input"], dict):
            name = _algorithm_name(item["input"])
            lines.append(f"{path}.name: unknown algorithm {name!r}{nearest(name, registry.TABLE['algorithm'])}")
        elif of_spec and item["type"] in ("string_type", "dict_type"):
            lines.append(f"{path}: Input should be a name or {{name: ..., setting: ...}}, got {item['input']!r}")
        elif item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = _elsewhere(str(loc[0])) if len(loc) == 1 else ""
            lines.append(f"{path}: no such setting{known or nearest(str(loc[-1]), _field_names(Config, loc[:-1]))}")
        else:
            lines.append(f"{path}: {item['msg']}, got {item['input']!r}")
    return "\n".join(dict.fromkeys(lines))


OF_IMAGES: dict[str, Any] = {
    "reward": {"weights": {"shapes_soft": 0.5, "shapes_strict": 0.5}},
    "eval": {
        "metrics": {
            "strict": "shapes_strict",
            "soft": "shapes_soft",
            "judge": "cnn_judge",
            "diversity": "diversity",
            "base_distance": "base_distance",
        }
    },
}
"""Where a run makes images and names no others; a simulator has a reward of its own."""

UNNAMED: dict[str, Any] = {"likelihood": {"name": "chain"}, "algorithm": {"name": "policy_gradient"}}
"""Components that a section without a name is of."""


def parse(values: dict[str, Any], trust_code: bool = False) -> Config:
    """A checked Config; ValueError lists every problem with its full path."""
    if isinstance(name := values.get("algorithm"), str):
        values = values | {"algorithm": {"name": name}}
    values = merge(UNNAMED, values)
    env = values.get("env")
    if not isinstance(env, dict) or env.get("name", "prompt") == "prompt":
        values = merge(OF_IMAGES, values)
    try:
        config = TypeAdapter(Config).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None
    check(config, trust_code)
    return config


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Paths whose values differ, leaving out those that may change on resume."""
    found = []
    for key in {**old, **new}:
        path = f"{prefix}{key}"
        if any(fnmatchcase(path, pattern) for pattern in MAY_CHANGE_ON_RESUME):
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += difference(a, b, f"{path}.")
        elif a != b:
            found.append(f"{path}: {a!r} -> {b!r}")
    return found
