"""The network of a checkpoint, and the policy around a network."""

from __future__ import annotations

import torch

from rlflow import registry
from rlflow.config.schema import Config
from rlflow.flow.field import VelocityField
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.squash import SQUASHES
from rlflow.models.freeze import freeze
from rlflow.models.hub import is_hub_id
from rlflow.models.io import load_field
from rlflow.models.pretrained.opening import is_pipeline
from rlflow.models.pretrained.pipeline import pretrained
from rlflow.parallel.dist import device

PRECISION = {"float32": None, "float64": None, "bfloat16": torch.bfloat16}


def opened_field(config: Config, trust_code: bool) -> VelocityField | None:
    """From a checkpoint; None where it is to be made from scratch."""
    spec = config.policy.field
    if isinstance(spec, str) and spec not in registry.TABLE["model"]:
        return pretrained(spec) if is_pipeline(spec) or is_hub_id(spec) else load_field(spec, trust_code)
    name, _ = registry.split_spec("policy.field", spec)
    if "checkpoint" in registry.settings(registry.find("model", name, trust_code)):
        model: VelocityField = registry.build("model", "policy.field", spec, trust_code=trust_code)
        return model
    return None


def policy_around(
    field: VelocityField, config: Config, trust_code: bool = False, place: torch.device | None = None
) -> FlowPolicy:
    """The policy of a config around its network, on `place` or this process's device; its steps are not checked."""
    c, place = config.policy, place or device()
    if c.frozen is not None:
        with registry.located("policy.frozen"):
            freeze(field, c.frozen)
    if c.grad_checkpointing:
        field.grad_checkpointing = True
    if c.precision == "float64":
        field = field.double()
    field = field.to(place)
    shapes = {"num_features": field.num_features, "event_shape": tuple(field.event_shape)}
    kernel = registry.build("kernel", "policy.kernel", c.kernel, shapes, trust_code)
    kernel = kernel.to(place, torch.float64 if c.precision == "float64" else torch.float32)
    if c.guidance is not None:
        field = registry.build("guidance", "policy.guidance", c.guidance, {"field": field}, trust_code)
    policy = FlowPolicy(
        field,
        kernel,
        solver=registry.build("solver", "policy.solver", c.solver, trust_code=trust_code),
        grid=registry.build("grid", "policy.grid", c.grid, {"field": field.unguided}, trust_code),
        num_steps=c.num_steps,
        squash=SQUASHES[c.squash](),
        autocast=PRECISION[c.precision],
    )
    if c.offload_reference:
        policy.weights.places["ref"] = torch.device("cpu")
    return policy
