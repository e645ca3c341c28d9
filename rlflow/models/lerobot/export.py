"""A tuned policy as a folder that plain LeRobot opens and runs: weights, config, processors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch import Tensor

from rlflow.files import as_readable
from rlflow.flow.field import VelocityField
from rlflow.models.lerobot.field import LeRobotField

STEPS = ("num_steps", "num_inference_steps", "num_denoise_steps")
"""How configs call the number of denoising steps: SmolVLA, pi0 and pi0.5, EO-1."""


def save_policy(
    field: VelocityField, folder: str | Path, n_action_steps: int | None = None, num_steps: int | None = None
) -> Path:
    """Write the weights in place as LeRobot does, a LoRA merged, with the processors of the checkpoint beside them.

    `n_action_steps`: actions of a chunk that are carried out; `num_steps` of denoising; the checkpoint's own unless
    given. ValueError for a field of another kind.
    """
    if not isinstance(field, LeRobotField):
        raise ValueError(f"a {type(field).__name__} is no policy of LeRobot's")
    policy: Any = field.policy
    own, processors = policy.config, field.processors
    policy.config = copy.copy(own)
    for name, value in {**getattr(processors, "restored", {}), **_asked(own, n_action_steps, num_steps)}.items():
        setattr(policy.config, name, value)
    try:
        merged = merged_lora(policy)
        policy.save_pretrained(str(folder), **({} if merged is None else {"state_dict": merged}))
    finally:
        policy.config = own
    if processors is not None:
        processors.save(Path(folder))  # type: ignore[attr-defined]
    as_readable(Path(folder))
    return Path(folder)


def _asked(config: Any, n_action_steps: int | None, num_steps: int | None) -> dict[str, int]:
    found = {} if n_action_steps is None else {"n_action_steps": n_action_steps}
    return found | ({} if num_steps is None else {n: num_steps for n in STEPS if hasattr(config, n)})


def merged_lora(policy: nn.Module) -> dict[str, Tensor] | None:
    """The policy's own state with every LoRA added to the layer it is on; None where there is no LoRA."""
    if not any("lora_" in name for name, _ in policy.named_parameters()):
        return None
    state = {n.replace(".base_layer.", "."): v for n, v in policy.state_dict().items() if "lora_" not in n}
    for name, module in policy.named_modules():
        if hasattr(module, "get_delta_weight"):
            (adapter,) = module.active_adapters
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = (weight.float() + module.get_delta_weight(adapter).float()).to(weight.dtype)
    return state
