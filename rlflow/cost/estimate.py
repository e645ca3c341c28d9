"""What a recipe will cost, before anything is downloaded or trained: rows, memory and FLOPs of one process.

Network rows are counted by the closed form that `doctor` checks. Memory is the sum of what stays (weights, weight sets,
optimiser) and the worst moment of an iteration (sampling, scoring with its backward, a step), from a trace of the
recipe's own code without data. Time is FLOPs over a share of the GPU's peak: an estimate, and a lower bound where
simulators, rewards or small networks set the pace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from rlflow.config.processes import can_share, check_updates, share
from rlflow.config.schema import Config
from rlflow.config.steps import make_steps
from rlflow.cost.formula import Cost, Sampling
from rlflow.cost.gpus import GPU
from rlflow.cost.reward_networks import reward_networks
from rlflow.cost.skeleton import Skeleton, skeleton
from rlflow.cost.trace import Trace, parameter_bytes
from rlflow.cost.updates import FLOAT, Update, update_of
from rlflow.flow.field import VelocityField
from rlflow.models.pretrained.shapes_of import beside, encoder_bytes, quantised_saving, releases_encoders
from rlflow.parallel.shards import blocks
from rlflow.rl.groups import Groups
from rlflow.types import tree_leaves

ITERATIONS = 200
"""Over which plans that change with the iteration are averaged."""
UTILISATION = 0.25
"""Share of the peak that large networks reach in practice: SD3.5 medium with a LoRA on an H100 .21 to .25."""


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
        shape = self.shape(config, gpus)
        memory = Memory(_staying(config, bare, shape.update, gpus), _moments(config, bare, traced, shape, gpus))
        return Estimate(gpus, shape.samples, shape.rows, shape.cost, memory, _flops(shape, traced, bare.policy.field))

    def shape(self, config: Config, gpus: int = 1) -> Shape:
        """Sizes and network rows alone; ValueError where training would refuse so many processes."""
        bare, traced = self.traced(config.policy.grad_checkpointing)
        groups, horizon = share(config, world=gpus), config.env.horizon or bare.horizon
        check_updates(config, groups, horizon)
        return Shape.of(config, bare, traced, groups, horizon, self.trust_code)


@dataclass(frozen=True)
class Shape:
    """Sizes of an iteration."""

    samples: int
    """Of all processes; the rest is of one."""
    rows: int
    copies: int
    cost: Cost
    rows_per_call: int
    update: Update

    @staticmethod
    def of(
        config: Config, bare: Skeleton, traced: Trace, groups: Groups, horizon: int, trust_code: bool = False
    ) -> Shape:
        policy, likelihood = bare.policy, bare.likelihood
        steps = make_steps(config, trust_code)
        grid = policy.grid(policy.num_steps)
        plans = [steps(i, grid, groups.row_ids()) for i in range(ITERATIONS)]
        copies = groups.group_size if horizon == 1 and config.env.mode == "episodes" else 1
        rows = groups.num_rows * horizon
        sampling = Sampling(policy, likelihood, rows, copies, config.env.shared_noise)
        update = update_of(config, bare, traced, rows, plans)
        return Shape(
            samples=groups.total_rows * horizon,
            rows=rows,
            copies=copies,
            cost=_mean([Cost(sampling.cost(plan), *update.cost(rows, plan)) for plan in plans]),
            rows_per_call=min(groups.num_rows, max(copies, config.env.rows_per_call // copies * copies)),
            update=update,
        )


def _mean(costs: list[Cost]) -> Cost:
    total = torch.tensor([(c.rollout, c.reference, c.update) for c in costs], dtype=torch.float64).mean(0)
    return Cost(*(round(v) for v in total.tolist()))


def _flops(shape: Shape, traced: Trace, field: VelocityField) -> float:
    """Of one process's iteration."""
    cost, graph = shape.cost, shape.update.graph
    forward = (cost.rollout + cost.reference) / field.calls * traced.flops(traced.sampling)
    return forward + cost.update / (field.calls + 2 * field.graph_calls) * traced.flops(graph)


def _shares(config: Config, gpus: int) -> int:
    """Processes among which the network is shared out."""
    return gpus if config.train.sharding == "full" else 1


def _staying(config: Config, bare: Skeleton, update: Update, gpus: int) -> dict[str, float]:
    """Bytes that an iteration finds and leaves."""
    shares = _shares(config, gpus)
    trained = parameter_bytes(bare.policy, trained=True) / shares
    numbers = sum(p.numel() for p in bare.policy.parameters() if p.requires_grad) / shares
    element = trained / max(1, numbers)
    needed = update.reference or update.anchor
    reference = trained if needed and not config.policy.offload_reference else 0
    reference += update.weight_sets * numbers * max(FLOAT, element)
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
    if bare.through is not None:
        found.append("activations of the rewards, which are asked for their gradient")
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
    gathered = _gathered(bare) if shares > 1 else 0.0
    rows, call, u = shape.rows, shape.rows_per_call, shape.update
    event = torch.Size(bare.policy.event_shape).numel() * FLOAT
    observed = 2 * sum(v.numel() * v.element_size() for v in tree_leaves(bare.obs_spec))  # obs and final_obs
    chains = rows * (event + observed + u.kept())
    conds = 0.0 if bare.policy.encoder_trains else traced.cond_bytes() * (rows // shape.copies)
    kept = {"chains": chains + rows * u.reference_kept, "conditions": conds, "gathered blocks": gathered}
    update = {**kept, "gradients": trained}
    minibatch = -(-rows // u.num_minibatches)
    moments = {
        "sampling": {**kept, "chains": 2 * chains, f"sampling {call} rows": traced.bytes(traced.sampling, call)},
        "decoding": {**kept, f"decoding {call} rows": traced.bytes(traced.decoding, call)},
        "scoring": {**update, f"activations of {u.at_once} pairs": u.in_hand + traced.bytes(u.graph, u.at_once)},
        "the critic's step": {**update, f"critic of {minibatch} rows": traced.bytes(traced.value, minibatch)},
        "the optimiser's step": {**update, "temporaries": 3 * trained if gpus > shares else 0.0},
    }
    if u.through_reward:
        back = u.in_hand + traced.bytes(traced.grading, u.at_once)
        moments["the reward's gradient"] = {**update, f"decoding {u.at_once} rows and back": back}
    return moments
