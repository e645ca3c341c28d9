"""`rlflow plan`: what a recipe will cost, before anything is downloaded or trained.

Network rows are counted by the closed form that `doctor` checks. Memory is the sum of what stays (weights, weight sets,
optimiser) and the worst moment of an iteration (sampling, scoring with its backward, a step), from a trace of the
recipe's own code without data. Time is FLOPs over a share of the GPU's peak: an estimate, and a lower bound where
simulators, rewards or small networks set the pace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn as nn

from rlflow.config.processes import can_share, check_updates, share
from rlflow.config.schema import Config
from rlflow.config.steps import make_steps
from rlflow.console import terminal
from rlflow.cost.formula import Cost, Ratios, Sampling
from rlflow.cost.gpus import GPU
from rlflow.cost.reward_networks import reward_networks
from rlflow.cost.skeleton import Skeleton, learner, skeleton
from rlflow.cost.trace import Trace, parameter_bytes
from rlflow.flow.field import VelocityField
from rlflow.models.pretrained.shapes_of import beside, encoder_bytes, quantised_saving, releases_encoders
from rlflow.parallel.shards import blocks
from rlflow.rl.groups import Groups
from rlflow.types import tree_leaves

ITERATIONS = 200
"""Over which plans that change with the iteration are averaged."""
UTILISATION = 0.25
"""Share of the peak that large networks reach in practice: SD3.5 medium with a LoRA on an H100 .21 to .25."""
RESERVE = 0.9
"""Share of a GPU's memory that tensors may take; the rest is the driver's context and fragments."""
FLOAT = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one process by part; `peak` is what stays plus the worst moment."""

    staying: Mapping[str, float]
    moments: Mapping[str, Mapping[str, float]]

    @property
    def worst(self) -> str:
        """Name of the moment that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """What there is at the worst moment."""
        return {**self.staying, **self.moments[self.worst]}

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """A recipe on `gpus` devices: rows of one process, mean cost of an iteration, memory and FLOPs of a process."""

    gpus: int
    samples: int
    rows: int
    cost: Cost
    memory: Memory
    flops: float

    def seconds(self, gpu: GPU, precision: str) -> float:
        """Of the network alone, per iteration."""
        return self.flops / (UTILISATION * gpu.peak(precision))


class Planner:
    """Traces a recipe once for each way its network can be run, and estimates it with any other settings."""

    def __init__(self, config: Config, trust_code: bool = False):
        self.config, self.trust_code = config, trust_code
        self._traced: dict[bool, tuple[Skeleton, Trace]] = {}

    def traced(self, checkpointing: bool) -> tuple[Skeleton, Trace]:
        """The skeleton and its trace, with activations kept or recomputed."""
        if checkpointing not in self._traced:
            policy = replace(self.config.policy, grad_checkpointing=checkpointing)
            found = skeleton(replace(self.config, policy=policy), self.trust_code)
            self._traced[checkpointing] = (
                found,
                Trace(found.policy, found.likelihood, found.obs_spec, found.mode, found.critic),
            )
        return self._traced[checkpointing]

    def allows(self, config: Config, gpus: int) -> bool:
        """True where training would start with so many processes."""
        horizon = config.env.horizon or self.traced(config.policy.grad_checkpointing)[0].horizon
        return can_share(config, gpus, horizon)

    def estimate(self, config: Config, gpus: int = 1) -> Estimate:
        """Of the recipe with the settings of `config`, whose network and chain are those of the recipe.

        ValueError where training would refuse so many processes.
        """
        bare, traced = self.traced(config.policy.grad_checkpointing)
        groups, horizon = share(config, world=gpus), config.env.horizon or bare.horizon
        check_updates(config, groups, horizon)
        shape = Shape.of(config, bare, groups, horizon, self.trust_code)
        memory = Memory(_staying(config, bare, gpus), _moments(config, bare, traced, shape, gpus))
        flops = _flops(shape.cost, traced, bare.policy.field)
        return Estimate(gpus, groups.total_rows * horizon, shape.rows, shape.cost, memory, flops)


@dataclass(frozen=True)
class Shape:
    """Sizes of an iteration on one process."""

    rows: int
    copies: int
    cost: Cost
    num_columns: int
    rows_per_call: int
    pairs: int

    @staticmethod
    def of(config: Config, bare: Skeleton, groups: Groups, horizon: int, trust_code: bool = False) -> Shape:
        c, policy, likelihood = learner(config), bare.policy, bare.likelihood
        steps = make_steps(config, trust_code)
        grid = policy.grid(policy.num_steps)
        plans = [steps(i, grid, groups.row_ids()) for i in range(ITERATIONS)]
        copies = groups.group_size if horizon == 1 and config.env.mode == "episodes" else 1
        rows = groups.num_rows * horizon
        sampling = Sampling(policy, likelihood, rows, copies, config.env.shared_noise)
        ratios = Ratios(policy, likelihood, c.epochs, c.micro_batch, _scores_reference(config, bare), bool(c.anchor))
        r = max(1, max(likelihood.num_columns(plan) for plan in plans))
        whole = max(1, c.micro_batch // r) * r if r <= c.micro_batch else c.micro_batch
        return Shape(
            rows=rows,
            copies=copies,
            cost=_mean([Cost(sampling.cost(plan), *ratios.cost(rows, plan)) for plan in plans]),
            num_columns=r,
            rows_per_call=min(groups.num_rows, max(copies, config.env.rows_per_call // copies * copies)),
            pairs=min(whole, -(-rows // c.num_minibatches) * r),
        )


def _mean(costs: list[Cost]) -> Cost:
    total = torch.tensor([(c.rollout, c.reference, c.update) for c in costs], dtype=torch.float64).mean(0)
    return Cost(*(round(v) for v in total.tolist()))


def _flops(cost: Cost, traced: Trace, field: VelocityField) -> float:
    """Of one process's iteration."""
    forward = (cost.rollout + cost.reference) / field.calls * traced.flops(traced.sampling)
    return forward + cost.update / (field.calls + 2 * field.graph_calls) * traced.flops(traced.scoring)


def _shares(config: Config, gpus: int) -> int:
    """Processes among which the network is shared out."""
    return gpus if config.train.sharding == "full" else 1


def _scores_reference(config: Config, bare: Skeleton) -> bool:
    """Whether the reference weights score every pair."""
    return learner(config).needs_reference or bare.objective.needs_reference


def _staying(config: Config, bare: Skeleton, gpus: int) -> dict[str, float]:
    """Bytes that an iteration finds and leaves."""
    shares = _shares(config, gpus)
    trained = parameter_bytes(bare.policy, trained=True) / shares
    numbers = sum(p.numel() for p in bare.policy.parameters() if p.requires_grad) / shares
    element = trained / max(1, numbers)
    needed = _scores_reference(config, bare) or learner(config).anchor
    reference = trained if needed and not config.policy.offload_reference else 0
    reference += len(bare.objective.weight_sets) * numbers * max(FLOAT, element)
    critic = 0 if bare.critic is None else 4 * parameter_bytes(bare.critic, trained=True)
    network = bare.policy.field.unguided
    return {
        "weights, frozen": (parameter_bytes(bare.policy, trained=False) - quantised_saving(network)) / shares,
        "VAE": sum(parameter_bytes(part, trained=False) for part in beside(network)),
        "text encoders": 0 if releases_encoders(network) else encoder_bytes(network),
        "rewards": reward_networks(config).bytes,
        "weights, trained": trained,
        "average (ema) and reference": numbers * max(FLOAT, element) + reference,
        "optimiser": 2 * trained,
        "critic with its optimiser": critic,
    }


def not_counted(config: Config, bare: Skeleton) -> list[str]:
    """What the card also holds, always or for a moment, that is in no part of the memory."""
    network, found = bare.policy.field.unguided, []
    if releases_encoders(network):
        found.append(f"text encoders ({encoder_bytes(network) / 2**20:,.1f} MiB beside the weights, before training)")
    return [*found, *reward_networks(config).not_counted]


def _gathered(bare: Skeleton) -> float:
    """Bytes of the block that runs and of the next, and of what stands outside all blocks, with their gradients."""
    network = bare.policy.field.unguided

    def size(module: nn.Module) -> int:
        return parameter_bytes(module, trained=False) + 2 * parameter_bytes(module, trained=True)

    sizes = [size(block) for block in blocks(network)]
    return float(2 * max(sizes, default=0) + size(network) - sum(sizes))


def _moments(config: Config, bare: Skeleton, traced: Trace, shape: Shape, gpus: int) -> dict[str, dict[str, float]]:
    """Bytes that come on top, at each of the moments that can be the worst."""
    shares = _shares(config, gpus)
    trained = parameter_bytes(bare.policy, trained=True) / shares
    largest = max(parameter_bytes(nn.ParameterList([p]), trained=True) for p in bare.policy.parameters()) / shares
    gathered = _gathered(bare) if shares > 1 else 0.0
    rows, call = shape.rows, shape.rows_per_call
    event = torch.Size(bare.policy.event_shape).numel() * FLOAT
    observed = 2 * sum(v.numel() * v.element_size() for v in tree_leaves(bare.obs_spec))  # obs and final_obs
    chains = rows * (event + observed) + traced.pair_bytes() * rows * shape.num_columns
    reference = rows * shape.num_columns * event if _scores_reference(config, bare) else 0
    conds = 0.0 if bare.policy.encoder_trains else traced.cond_bytes() * (rows // shape.copies)
    kept = {"chains": chains + reference, "conditions": conds, "gathered blocks": gathered}
    update = {**kept, "gradients": trained}
    minibatch = -(-rows // learner(config).num_minibatches)
    return {
        "sampling": {**kept, "chains": 2 * chains, f"sampling {call} rows": traced.bytes(traced.sampling, call)},
        "decoding": {**kept, f"decoding {call} rows": traced.bytes(traced.decoding, call)},
        "scoring": {**update, f"activations of {shape.pairs} pairs": traced.bytes(traced.scoring, shape.pairs)},
        "the critic's step": {**update, f"critic of {minibatch} rows": traced.bytes(traced.value, minibatch)},
        "the optimiser's step": {**update, "temporaries": 3 * trained if gpus > shares else max(trained, 2 * largest)},
    }


# -- what makes it fit ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """Settings that were tried, in order, and what they bring the peak to."""

    overrides: dict[str, Any]
    estimate: Estimate
    fits: bool


def make_fit(planner: Planner, gpu: GPU, gpus: int = 1) -> Fit:
    """The first settings, from the mildest, whose peak fits; the smallest there is where none does."""
    limit, config = RESERVE * 1e9 * gpu.gigabytes, planner.config
    overrides: dict[str, Any] = {}
    found = planner.estimate(config, gpus)
    while found.memory.peak > limit:
        change = _next_change(planner, config, found)
        if change is None:
            return Fit(overrides, found, False)
        overrides |= change
        config = _with(config, change)
        found = planner.estimate(config, gpus)
    return Fit(overrides, found, True)


def _next_change(planner: Planner, config: Config, found: Estimate) -> dict[str, Any] | None:
    """One setting that lowers the worst moment; none of them changes what is learnt."""
    worst, rows, pairs = found.memory.worst, config.env.rows_per_call, learner(config).micro_batch
    smallest = config.env.group_size if config.env.mode == "episodes" else 1
    if worst in ("sampling", "decoding") and rows > smallest:
        return {"env.rows_per_call": max(smallest, rows // 2)}
    if worst == "scoring" and not config.policy.grad_checkpointing:
        return {"policy.grad_checkpointing": True}
    if worst == "scoring" and pairs > 1:
        return {"algorithm.micro_batch": pairs // 2}
    parts = {"train.sharding": "full"}
    shardable = found.gpus > 1 and planner.allows(_with(config, parts), found.gpus)
    return parts if shardable and config.train.sharding == "replicated" else None


def more_gpus(planner: Planner, gpu: GPU, gpus: int) -> tuple[int, Fit] | None:
    """The next power of two of GPUs on which it fits, a network in parts if need be; None where none is found."""
    config = planner.config
    while (gpus := 2 * gpus) <= config.env.num_groups:
        if planner.allows(config, gpus) and (fit := make_fit(planner, gpu, gpus)).fits:
            return gpus, fit
    return None


def _other_ways(config: Config) -> str:
    """What would change the training itself, of a pre-trained network."""
    field = config.policy.field
    if not isinstance(field, Mapping) or field.get("name") != "pretrained":
        return ""
    if field.get("lora") is None and field.get("adapter") is None:
        return "\nA LoRA needs far less than the whole network: policy.field.lora=32 policy.field.weights=bfloat16"
    if field.get("quantize") is None:
        return "\nA quantised base takes a half or a third: policy.field.quantize=int8 or nf4"
    return ""


def _with(config: Config, change: Mapping[str, Any]) -> Config:
    for path, value in change.items():
        section, _, key = path.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


# -- output ---------------------------------------------------------------------------------------


def plan_as_json(planner: Planner, gpu: GPU, gpus: int) -> dict[str, Any]:
    """Everything the command prints."""
    found, fit = planner.estimate(planner.config, gpus), make_fit(planner, gpu, gpus)
    precision = planner.config.policy.precision
    more = None if fit.fits else more_gpus(planner, gpu, gpus)
    per_image = {k: v * gpus / found.samples for k, v in asdict(found.cost).items()}
    return {
        "gpu": gpu.name,
        "gpus": gpus,
        "samples_per_iteration": found.samples,
        "network_rows_per_iteration": {**asdict(found.cost), "total": found.cost.total},
        "network_rows_per_sample": {**per_image, "total": sum(per_image.values())},
        "memory_bytes": dict(found.memory.parts),
        "not_counted": not_counted(planner.config, planner.traced(planner.config.policy.grad_checkpointing)[0]),
        "worst_moment": found.memory.worst,
        "peak_bytes": found.memory.peak,
        "limit_bytes": RESERVE * 1e9 * gpu.gigabytes,
        "fits": found.memory.peak <= RESERVE * 1e9 * gpu.gigabytes,
        "settings_that_fit": fit.overrides if fit.fits else None,
        "smallest": {"settings": fit.overrides, "peak_bytes": fit.estimate.memory.peak},
        "more_gpus": None if more is None else {"gpus": more[0], "settings": more[1].overrides},
        "tflop_per_iteration": found.flops * gpus / 1e12,
        "network_seconds_per_iteration": found.seconds(gpu, precision),
    }


def print_plan(planner: Planner, gpu: GPU, gpus: int) -> None:
    """Tables on the terminal."""
    from rich.table import Table

    values, console = plan_as_json(planner, gpu, gpus), terminal()
    rows = Table("network evaluations", "per sample", f"per iteration ({values['samples_per_iteration']} samples)")
    for name, each in values["network_rows_per_sample"].items():
        rows.add_row(name, f"{each:.2f}", f"{values['network_rows_per_iteration'][name] * gpus:,}")
    console.print(rows)
    memory = Table(f"memory of a process at its worst moment ({values['worst_moment']})", "MiB")
    for name, size in values["memory_bytes"].items():
        memory.add_row(name, f"{size / 2**20:,.1f}")
    memory.add_row("peak", f"{values['peak_bytes'] / 2**20:,.1f}")
    memory.add_row(f"limit: {RESERVE:.0%} of {gpu.gigabytes:g} GB", f"{values['limit_bytes'] / 2**20:,.1f}")
    console.print(memory)
    if values["not_counted"]:
        console.print(f"Not counted: {', '.join(values['not_counted'])}", soft_wrap=True)
    console.print(_verdict(values, gpu), soft_wrap=True)
    if values["settings_that_fit"] is None:
        console.print(_help(values, gpu) + _other_ways(planner.config), soft_wrap=True)


def _words(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={str(value).lower()}" for name, value in settings.items())


def _verdict(values: Mapping[str, Any], gpu: GPU) -> str:
    tflop, seconds = values["tflop_per_iteration"], values["network_seconds_per_iteration"]
    time = f"{tflop:.3g} TFLOP an iteration: {seconds:.2g} s at {UTILISATION:.0%} of the peak of {gpu.name}"
    time += " (an estimate, of the network alone: no rewards, no simulators)"
    if values["fits"]:
        return f"{time}\nFits."
    smallest, settings = values["smallest"]["peak_bytes"] / 1e9, _words(values["smallest"]["settings"])
    if values["settings_that_fit"] is not None:
        return f"{time}\nDoes not fit. It fits, at {smallest:.1f} GB, with: {settings}"
    return f"{time}\nDoes not fit: it needs {smallest:.1f} GB{', with: ' if settings else ''}{settings}"


def _help(values: Mapping[str, Any], gpu: GPU) -> str:
    more = values["more_gpus"]
    if more is None:
        return "No number of such GPUs was found to do, with groups and minibatches shared out evenly."
    settings = _words(more["settings"])
    return f"It fits on {more['gpus']} x {gpu.name}{', with: ' if settings else ''}{settings}"
