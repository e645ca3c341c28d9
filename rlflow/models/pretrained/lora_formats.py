"""A LoRA that was saved here, written as other programs read it.

| format | names | the scale | read by |
|---|---|---|---|
| as saved | transformer.LAYER.lora_A.weight, unet. ... | in the metadata | diffusers; others take it for 1 |
| plain | the same | in the tensors | diffusers, ComfyUI, ai-toolkit: whatever looks for no scale |
| kohya | lora_transformer_LAYER_WITH_BARS.lora_down.weight, lora_unet_ ... | alpha tensors | ComfyUI, A1111 |
| peft | base_model.model.LAYER.lora_A.weight | adapter_config.json | peft |

Layers keep the names that diffusers gives them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rlflow.files import read_tensors, save_tensors
from rlflow.models.pretrained.lora import WEIGHTS
from rlflow.models.pretrained.lora_names import BIAS, DOWN, SIZES, UP, Tensors, some, split


@dataclass(frozen=True)
class Saved:
    """A saved LoRA: what its pipeline calls the network, peft's settings, the tensors by LAYER.PART."""

    component: str
    settings: dict[str, Any]
    tensors: Tensors

    def scale(self, layer: str) -> float:
        """Of B A, as peft reads it from the settings."""
        from peft.utils.other import get_pattern_key

        found = []
        for usual, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            given = self.settings.get(pattern) or {}
            found.append(given.get(get_pattern_key(given.keys(), layer), self.settings[usual]))
        rank, alpha = found
        return float(alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank)


def read_saved(folder: Path) -> Saved:
    """Of a folder that `save` wrote; ValueError for another."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS}: give RUN/model of a LoRA's run, or what rf.save wrote")
    with safe_open(file, framework="pt") as opened:
        told = (opened.metadata() or {}).get("lora_adapter_metadata")
    tensors = read_tensors(file)
    components = {name.partition(".")[0] for name in tensors}
    if told is None or len(components) != 1:
        raise ValueError(f"{file} was not saved here: start a run from it (policy.field.adapter), or rf.save it")
    (component,) = components
    settings = {name.removeprefix(f"{component}."): value for name, value in json.loads(told).items()}
    return Saved(component, settings, {name.removeprefix(f"{component}."): v for name, v in tensors.items()})


def write_as(saved: Saved, out: Path, form: str) -> Path:
    """The file of a format of FORMATS, in the folder `out`; ValueError for what it has no place for."""
    out.mkdir(parents=True, exist_ok=True)
    return FORMATS[form](saved, out)


def _parts(saved: Saved) -> list[tuple[str, str, Tensor]]:
    """(layer, part, tensor) of all."""
    found = [(split(name), value) for name, value in saved.tensors.items()]
    return [(*both, value) for both, value in found if both is not None]


def _plain(saved: Saved, out: Path) -> Path:
    named = {}
    for layer, part, value in _parts(saved):
        scale = saved.scale(layer) if part in (UP, BIAS) else 1.0
        named[f"{saved.component}.{layer}.{part}"] = value * scale
    return _write(named, out / WEIGHTS)


def _kohya(saved: Saved, out: Path) -> Path:
    prefix = "lora_unet_" if saved.component == "unet" else "lora_transformer_"
    ends = {DOWN: "lora_down.weight", UP: "lora_up.weight", SIZES: "dora_scale"}
    if unknown := [name for name in saved.tensors if name.endswith(BIAS)]:
        raise ValueError(f"kohya's files have no place for {some(unknown)}: write it as peft or diffusers")
    named = {}
    for layer, part, value in _parts(saved):
        flat = prefix + layer.replace(".", "_")
        named[f"{flat}.{ends[part]}"] = value.reshape(-1, *[1] * max(1, value.ndim - 2)) if part == SIZES else value
        if part == DOWN:
            named[f"{flat}.alpha"] = torch.tensor(saved.scale(layer) * len(value))
    return _write(named, out / "lora.safetensors")


def _peft(saved: Saved, out: Path) -> Path:
    config = {"peft_type": "LORA", **saved.settings}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    named = {f"base_model.model.{name}": value for name, value in saved.tensors.items()}
    return _write(named, out / "adapter_model.safetensors")


def _write(tensors: Tensors, file: Path) -> Path:
    save_tensors({name: value.contiguous() for name, value in tensors.items()}, file, {"format": "pt"})
    return file


FORMATS: dict[str, Callable[[Saved, Path], Path]] = {
    "plain": _plain,
    "kohya": _kohya,
    "peft": _peft,
}
