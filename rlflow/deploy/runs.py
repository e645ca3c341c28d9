"""Finished or running run folders and checkpoints, opened again: for evaluation, sampling and the Python interface."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch

from rlflow import registry
from rlflow.assembly.environment import heldout_prompts, make_steering
from rlflow.assembly.evaluator import judged_by, make_evaluator, make_select
from rlflow.assembly.policy import make_policy
from rlflow.config import inputs, recipes
from rlflow.config.limits import check_select
from rlflow.config.parse import parse, saved
from rlflow.config.schema import Config, PolicyConfig
from rlflow.config.values import merge
from rlflow.deploy.steered import Steered
from rlflow.evaluation.episodes import EpisodeEvaluator
from rlflow.evaluation.images import Evaluator
from rlflow.flow.field import VelocityField
from rlflow.flow.grid import FromScheduler
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.models.hub import is_hub_id
from rlflow.models.io import load_field, read_config, save_field
from rlflow.models.pretrained.opening import is_pipeline
from rlflow.models.pretrained.pipeline import PretrainedField, pretrained
from rlflow.parallel.dist import device
from rlflow.ranges import Spec
from rlflow.train.checkpoint import Checkpoints
from rlflow.train.seal import taken_up


def is_run(path: str | Path) -> bool:
    """True for a run folder."""
    return (Path(path) / "config.yaml").is_file()


def read_run_config(folder: str | Path, trust_code: bool = False) -> Config:
    """The resolved config of a run folder, with its own copies of what is gone or was changed."""
    values = saved(recipes.read(str(Path(folder) / "config.yaml")))
    return parse(_at_hand(Path(folder), values), trust_code)


def _at_hand(run: Path, values: dict[str, Any]) -> dict[str, Any]:
    found, changed = inputs.at_hand(run, values)
    for line in changed:
        warnings.warn(line, stacklevel=2)
    return found


def judging_config(name: str | Path, trust_code: bool = False) -> Config:
    """The config that evaluates a run (its own) or a checkpoint: its run's, or what its config.json says.

    A checkpoint that says nothing is judged as the scenes are.
    """
    if is_run(name):
        return read_run_config(name, trust_code)
    if _is_foreign(name):
        what = "is" if is_pipeline(str(name)) else "is no run and no checkpoint on this disk; on the hub it would be"
        raise ValueError(
            f"{name} {what} a pipeline, which does not say how it is judged: evaluate a run that starts from it, or "
            f"look at pictures with `rlflow sample {name} --prompt TEXT --out x.png`"
        )
    scored_nothing = {"policy": {"field": str(name)}, "steps": "none", "train": {"iterations": 1}}
    return parse(merge(scored_nothing, _said(name, trust_code)), trust_code)


def world_of(name: str | Path, trust_code: bool = False) -> str:
    """Name of the environment a run or checkpoint is for; what makes images, pipelines too, is for 'prompt'."""
    return "prompt" if _is_foreign(name) else judging_config(name, trust_code).env.name


def _is_foreign(name: str | Path) -> bool:
    """True for a pipeline of diffusers, in a folder or on the hub; not for runs/typo, where there is a folder runs."""
    if is_run(name) or is_pipeline(str(name)):
        return not is_run(name)
    return is_hub_id(str(name)) and not Path(name).parent.is_dir()


def _said(name: str | Path, trust_code: bool) -> dict[str, Any]:
    """How a checkpoint says that it is judged: in its config.json, or by the run it lies in; {} where nothing does."""
    said = read_config(str(name)).get("judged_by") or {}
    run = Path(name).resolve().parent
    if not Path(name).is_dir() or not is_run(run):
        return dict(said)
    return _at_hand(run, said) if said else judged_by(read_run_config(run, trust_code))  # RUN/model


def load(
    name: str | Path,
    *,
    checkpoint: str = "last",
    weights: str | None = None,
    lora: int | None = None,
    resolution: int | None = None,
    frames: int | None = None,
    guidance: float | None = None,
    num_steps: int | None = None,
    variant: str | None = None,
    select: Spec | None = None,
    trust_code: bool = False,
) -> FlowPolicy:
    """A FlowPolicy from an embedded checkpoint ('shapes'), a checkpoint folder, a run folder, or a diffusers pipeline.

    It samples as it is evaluated: steps, solver, resolution, guidance and choice among samples are those of the run's,
    or the checkpoint's, evaluations; `select`, as in a recipe, replaces that choice. Of a run, `weights` is 'live' or
    'ema' (default: the ones the run evaluates). Of a diffusers pipeline (a folder or a hub id), the other
    settings: `lora` adds one of this rank, which then trains; without, nothing does. Resolution, frames (of a video),
    guidance and number of steps are the pipeline's own unless given; `variant` names its files' (fp16).
    """
    if not is_run(name):
        _check_of_runs(name, checkpoint, weights)
    if _is_foreign(name):
        made = _load_pipeline(str(name), lora, resolution, frames, guidance, num_steps, variant)
        config = _selecting(Config(policy=PolicyConfig(field=str(name))), name, select, trust_code)
        made.select = make_select(config, made, trust_code)
        return made
    if (lora, resolution, frames, guidance, num_steps, variant) != (None,) * 6:
        raise ValueError(
            f"{name} is no diffusers pipeline: lora, resolution, frames, guidance, num_steps and variant are of those"
        )
    if not is_run(name):
        if not _said(name, trust_code) and isinstance(field := load_field(str(name), trust_code), PretrainedField):
            return _as_its_pipeline(field.to(device()).requires_grad_(False))
        config = _selecting(judging_config(name, trust_code), name, select, trust_code)
        return _as_evaluated(make_policy(config, trust_code), config, trust_code)
    config = _selecting(read_run_config(name, trust_code), name, select, trust_code)
    return _as_evaluated(
        restored(config, name, checkpoint, weights or config.eval.weights, trust_code), config, trust_code
    )


def restored(config: Config, name: str | Path, checkpoint: str, chosen: str, trust_code: bool = False) -> FlowPolicy:
    """The policy of a run's config with the weights `chosen` of a checkpoint."""
    policy = make_policy(config, trust_code)
    checkpoints = Checkpoints(Path(name))
    _, state = checkpoints.load(checkpoint)
    with taken_up(checkpoints.path(checkpoint), "policy, weight_sets"):
        policy.load_state_dict(state["policy"])
        policy.weights.load_state_dict(state["weight_sets"])
    known = [n for n in ("live", "ema") if n == "live" or n in policy.weights.sets]
    if chosen not in known:
        raise ValueError(f"weights {chosen!r}: {name} has {' and '.join(known)}; `load(policy.field)` is the base")
    if chosen != "live":
        live = policy.weights.parameters()
        with torch.no_grad():
            for parameter, value in policy.weights.sets[chosen].items():
                live[parameter].copy_(value)
    return policy


def _as_evaluated(policy: FlowPolicy, config: Config, trust_code: bool) -> FlowPolicy:
    """With the sampler of its evaluations in place of the one that it trains with."""
    c = config.eval
    policy.num_steps = c.num_steps or policy.num_steps
    if c.solver is not None:
        policy.solver = registry.build("solver", "eval.solver", c.solver, trust_code=trust_code)
    if c.resolution is not None:
        policy.field.unguided.resize(c.resolution)
    policy.select = make_select(config, policy, trust_code)
    if (steering := make_steering(config, trust_code)) is not None:
        policy.select = Steered(policy.select, steering)
    return policy.requires_grad_(False)


def _selecting(config: Config, name: str | Path, select: Spec | None, trust_code: bool) -> Config:
    """With a choice among samples in place of its own; the critic of a run that names none is its own."""
    if select is None:
        return config
    if isinstance(select, dict) and select.get("scorer") == "critic":
        select = select | {"scorer": {"name": "critic", "run": str(name)}}
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, select=select))
    check_select(config, trust_code)
    return config


def _check_of_runs(name: str | Path, checkpoint: str, weights: str | None) -> None:
    """ValueError for a choice that only run folders have."""
    if (checkpoint, weights) != ("last", None):
        raise ValueError(f"{name} is no run folder: checkpoint and weights are of those, leave them out")


def _load_pipeline(
    name: str,
    lora: int | None,
    resolution: int | None,
    frames: int | None,
    guidance: float | None,
    num_steps: int | None,
    variant: str | None,
) -> FlowPolicy:
    found = pretrained(name, resolution=resolution, frames=frames, lora=lora, variant=variant).to(device())
    if lora is None:
        found.requires_grad_(False)
    return _as_its_pipeline(found, guidance, num_steps)


def _as_its_pipeline(found: PretrainedField, guidance: float | None = None, num_steps: int | None = None) -> FlowPolicy:
    """Sampling as the pipeline does: its grid, its guidance, its solver; FlowSDE is there for training."""
    scale = found.adapter.guidance if guidance is None else guidance
    field: VelocityField = found.adapter.guided(found, scale) if scale > 1 else found
    grid = FromScheduler(found)
    solver, num_steps = found.adapter.solver, num_steps or found.adapter.num_steps
    return FlowPolicy(field, FlowSDE().to(device()), grid=grid, solver=solver, num_steps=num_steps)


def save(policy: FlowPolicy, folder: str | Path, *, push: str | None = None) -> Path:
    """Write the policy's network as a checkpoint folder that `load` reads; the weights in place are saved.

    Of a diffusers pipeline it is a LoRA or transformer folder that plain diffusers reads. `push` uploads the folder
    to that repository of the Hugging Face hub (private if it is new), as the logged-in user.
    """
    folder = save_field(policy.field.unguided, folder)
    if push is not None:
        from huggingface_hub import HfApi

        HfApi().create_repo(push, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=push, folder_path=folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Asked:
    """How a run or a checkpoint is evaluated, filmed or recorded; None is as it says itself."""

    num: int | None = None
    num_steps: int | None = None
    solver: str | None = None
    seed: int | None = None
    checkpoint: str = "last"
    weights: str | None = None
    select: Spec | None = None
    trust_code: bool = False


def evaluator_of(name: str | Path, asked: Asked = Asked()) -> Evaluator | EpisodeEvaluator:
    """What evaluates a run (by its own settings unless given) or a checkpoint (by what it is judged by).

    The base images come from the policy before training, so the distance to it is meaningful.
    """
    trust_code = asked.trust_code
    if not is_run(name):
        _check_of_runs(name, asked.checkpoint, asked.weights)
    config = _selecting(judging_config(name, trust_code), name, asked.select, trust_code)
    c = config.eval
    judged = dataclasses.replace(
        c,
        num=asked.num or c.num,
        num_steps=asked.num_steps or c.num_steps,
        solver=asked.solver or c.solver,
        seed=c.seed if asked.seed is None else asked.seed,
    )
    config = dataclasses.replace(config, eval=judged)
    untrained = make_policy(config, trust_code)
    if config.env.name == "prompt":
        with registry.located(f"{name} is judged by {config.eval.prompts or config.env.prompts}"):
            heldout_prompts(config).check(untrained.field.unguided.tokenize)
    if not is_run(name):
        return make_evaluator(config, untrained, trust_code)
    policy = restored(config, name, asked.checkpoint, asked.weights or config.eval.weights, trust_code)
    evaluator = make_evaluator(config, policy.requires_grad_(False), trust_code)
    evaluator.compare_with(untrained)
    return evaluator


def evaluate(
    name: str | Path,
    *,
    num: int | None = None,
    num_steps: int | None = None,
    solver: str | None = None,
    seed: int | None = None,
    checkpoint: str = "last",
    weights: str | None = None,
    select: Spec | None = None,
    trust_code: bool = False,
) -> dict[str, float]:
    """Held-out metrics of a run folder or a checkpoint; exactly `num` samples. Settings as of `Asked`."""
    return evaluator_of(name, Asked(num, num_steps, solver, seed, checkpoint, weights, select, trust_code))().means()
