"""`policy.field: {name: lerobot, checkpoint: FOLDER_OR_ID}`: a policy of LeRobot's, its processors, a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn

from rlflow.models import hub
from rlflow.models.io import WEIGHTS
from rlflow.models.lerobot.eo1 import EO1Processors
from rlflow.models.lerobot.field import LeRobotField, seam_of
from rlflow.models.lerobot.processors import PolicyProcessors
from rlflow.ranges import Positive, Size

FITS = ("0.6.1", "0.7")
"""Versions of LeRobot from the first, below the second."""
INSTALL = "pip install 'lerobot[smolvla,pi]==0.6.1' (Python 3.12 or newer, an environment of its own: docs/vla.md)"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
KINDS = {"pi0": PolicyProcessors, "pi05": PolicyProcessors, "smolvla": PolicyProcessors, "eo1": EO1Processors}
"""Policies that end in LeRobot's `euler_integrate`, and what stands before them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_version() -> str:
    """LeRobot's version; ModuleNotFoundError where there is none, ValueError for one that does not fit."""
    try:
        found = metadata.version("lerobot")
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"policy.field lerobot, env lerobot: No module named 'lerobot': {INSTALL}") from None
    low, high = (_numbers(v) for v in FITS)
    if not low <= _numbers(found) < high:
        raise ValueError(f"lerobot {found} is installed, this adapter fits {FITS[0]} to below {FITS[1]}: {INSTALL}")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")[:3])


def open_policy(checkpoint: str) -> tuple[Any, dict[str, Any]]:
    """A policy on the CPU in evaluation mode, and what was changed in its config for it, as it was.

    ValueError for a folder that is none, a kind of policy that has no `euler_integrate`, adapted actions.
    """
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    known = {"local_files_only": hub.only_here(checkpoint)}
    try:
        config = PreTrainedConfig.from_pretrained(checkpoint, **known)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{checkpoint} is no policy of LeRobot's: {error}") from error
    if config.type not in KINDS:
        raise ValueError(f"{checkpoint} is a {config.type}: policies that are opened are {', '.join(KINDS)}")
    if getattr(config, "adapt_to_pi_aloha", False):
        raise ValueError(f"{checkpoint} turns its actions after the loop (adapt_to_pi_aloha): not supported")
    _check_weights(checkpoint)
    changed = {"device": "cpu", "compile_model": False, "gradient_checkpointing": False, "load_vlm_weights": False}
    changed["pretrained_path"] = checkpoint  # where EO-1 would ask the hub for its vision-language model first
    restored = {n: getattr(config, n) for n in (*changed, "rtc_config") if hasattr(config, n)}
    for name in restored:
        setattr(config, name, changed.get(name))  # rtc_config: none
    kind = get_policy_class(config.type)
    policy: Any = kind.from_pretrained(checkpoint, config=config, **known)
    seam_of(policy)
    return policy.eval(), restored


def _check_weights(checkpoint: str) -> None:
    """ValueError where there are none: LeRobot would go on with random ones."""
    if not Path(checkpoint).is_dir():
        hub.one_file(checkpoint, WEIGHTS)
    elif not (Path(checkpoint) / WEIGHTS).is_file():
        raise ValueError(f"{checkpoint} has no {WEIGHTS}: a LoRA that LeRobot trained has to be merged into its base")


def lerobot(
    checkpoint: str,
    lora: Size | None = None,
    lora_alpha: Positive | None = None,
    lora_modules: list[str] | None = None,
    rename: dict[str, str] | None = None,
    weights: Literal["float32", "bfloat16"] | None = None,
) -> LeRobotField:
    """A pi0, pi0.5, SmolVLA or EO-1 that LeRobot saved, from a folder or a hub id, with its processors.

    `lora`: rank of a new LoRA on the attention of the action expert (alpha: twice that unless given; `lora_modules`:
    ends of other layers' names); otherwise all that the velocity depends on trains. `rename`: names of the
    environment's entries to the policy's. `weights`: of what does not train; what trains is float32. Real-time chunking
    is switched off.
    """
    version = check_version()
    args = {k: v for k, v in locals().items() if v is not None and k != "version"}
    if lora is None and (lora_alpha, lora_modules) != (None, None):
        raise ValueError("lora_alpha and lora_modules are of a LoRA, and the whole expert trains: set lora too")
    from lerobot.policies.factory import make_pre_post_processors

    policy, restored = open_policy(checkpoint)
    before, after = make_pre_post_processors(policy.config, checkpoint)
    processors = KINDS[policy.config.type](before, after, policy.config, checkpoint, rename or {}, restored)
    field = wrapped(policy, processors, args, checkpoint)
    unit = ", ".join(f"{u:.3g}" for u in processors.unit().tolist())
    chunking = ", real-time chunking off" if restored.get("rtc_config") is not None else ""
    field.begun_from = (
        f"LeRobot {version} {policy.config.type} {checkpoint}: one unit of its noise is [{unit}] of an action{chunking}"
    )
    return field


def wrapped(policy: Any, processors: PolicyProcessors, args: dict[str, Any], checkpoint: str) -> LeRobotField:
    """The field of an opened policy, with the LoRA and the precision that `args` ask for."""
    example, dtype = processors.example(), DTYPES.get(args.get("weights", ""))
    if args.get("lora") is not None:
        expert = LeRobotField(policy, example, None).state_dict()
        add_lora(policy, set(expert), args["lora"], args.get("lora_alpha"), args.get("lora_modules"))
    field = LeRobotField(policy, example, processors)
    for p in policy.parameters():
        if p.requires_grad:
            p.data = p.data.float()
        elif dtype is not None and p.is_floating_point():
            p.data = p.data.to(dtype)
    where = str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint
    field.args = args | {"checkpoint": where}
    return field


def add_lora(policy: nn.Module, expert: set[str], rank: int, alpha: float | None, ends: Sequence[str] | None) -> None:
    """Freeze a policy and put a LoRA on the linear layers of its expert whose names end so; ValueError for an end that
    no layer has. `expert`: names of the parameters that the velocity depends on, with a `policy.` before them."""
    from peft import LoraConfig, inject_adapter_in_model

    mine = [n for n, m in policy.named_modules() if isinstance(m, nn.Linear) and f"policy.{n}.weight" in expert]
    wanted = list(ATTENTION if ends is None else ends)
    found = {end: [n for n in mine if n == end or n.endswith(f".{end}")] for end in wanted}
    if absent := [end for end, layers in found.items() if not layers]:
        some = sorted({n.rpartition(".")[2] for n in mine})
        raise ValueError(f"lora_modules: no linear layer of the expert ends in {absent}; some: {some}")
    targets = sorted({n for layers in found.values() for n in layers})
    policy.requires_grad_(False)
    settings = {"r": rank, "lora_alpha": 2 * rank if alpha is None else alpha, "target_modules": targets}
    inject_adapter_in_model(LoraConfig(**settings, init_lora_weights="gaussian"), policy)
    for name, p in policy.named_parameters():
        p.requires_grad_("lora_" in name)
    policy.eval()
