"""LoRA files that others wrote, in one form: peft's settings, the tensors by the network's layers, where the scale was.

| the scale is in | of |
|---|---|
| adapter_config.json beside it | peft |
| lora_adapter_metadata in the file | diffusers |
| LAYER.alpha in the file | kohya, LyCORIS, OneTrainer, ComfyUI, diffusers before peft |
| nothing: it is 1 | ai-toolkit, diffusers without metadata, XLabs |

A file is taken whole or refused: a part that is left out changes every picture and nobody is told.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from rlflow.models import hub
from rlflow.models.pretrained.adapter import Adapter
from rlflow.models.pretrained.lora import WEIGHTS
from rlflow.models.pretrained.lora_names import ALPHA, DOWN, Tensors, by_layer, some, split

NAMES = (WEIGHTS, "adapter_model.safetensors")
"""What diffusers and peft call the file."""
TEXT = ("text_encoder", "lora_te", "text_model.", "base_model.model.text_model.")
"""How the keys of a text encoder's LoRA begin."""

HONOURED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")
"""Settings of peft's LoraConfig that say what the tensors mean."""
IRRELEVANT = frozenset(
    {
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the tensors name the layers
        *("lora_dropout", "inference_mode"),  # how it was trained
        *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
        *("init_lora_weights", "qalora_group_size", "megatron_core"),
    }
)
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva", None)
"""Values of `init_lora_weights` that leave the base as it is: PiSSA, OLoRA, CorDA, LoftQ move it."""


@dataclass(frozen=True)
class Found:
    """Settings for peft's LoraConfig, LAYER.lora_A.weight ..., and where the scale was read."""

    settings: Mapping[str, Any]
    tensors: Tensors
    scale_from: str


def read_lora(source: str, border: Adapter) -> Found:
    """A file, a folder or a hub id; ValueError says which keys stand in the way."""
    file = _file(source)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        raw = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from error
    _check_text(raw)
    prefix, tensors = by_layer(raw, border)
    alphas = {n.removesuffix(f".{ALPHA}"): tensors.pop(n).item() for n in list(tensors) if n.endswith(f".{ALPHA}")}
    told, told_by = _told(file, metadata, border.component)
    _check_scale(prefix, told, alphas)
    if told is not None:
        settings, where = _settings(told), told_by
    else:
        settings, where = _inferred(tensors, alphas), _of_tensors(prefix, raw, alphas)
    return Found(settings | {"target_modules": _exactly(tensors)}, tensors, where)


def _of_tensors(prefix: str, raw: Tensors, alphas: Mapping[str, float]) -> str:
    """Where the scale is in a file without settings."""
    if prefix == "converted" and any(name.endswith(f".{ALPHA}") for name in raw):
        return "the file's alpha tensors, which diffusers' converter multiplied in"
    return "the file's alpha tensors" if alphas else "no place in the file: alpha is the rank"


def _file(source: str) -> Path:
    """The safetensors file of a path, a folder or a hub id."""
    path = Path(source)
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if not path.is_dir():
        if not hub.is_hub_id(source):
            raise ValueError("it is no folder and no .safetensors file")
        path = hub.adapter_folder(source)
    files = sorted(path.glob("*.safetensors"))
    if len(usual := [f for f in files if f.name in NAMES]) == 1:
        return usual[0]
    if len(files) != 1:
        found = f"several: name one of {[f.name for f in files]}" if files else "none: save it as safetensors"
        raise ValueError(f"it should hold one .safetensors file, and holds {found}")
    return files[0]


def _check_text(raw: Collection[str]) -> None:
    if text := [name for name in raw if name.startswith(TEXT) or ".text_model." in name]:
        raise ValueError(
            f"it holds LoRA of a text encoder too ({some(text)}), and only the network's would be "
            f"used: remove those {len(text)} tensors if it is meant to work without them"
        )


# -- settings -------------------------------------------------------------------------------------


def _check_scale(prefix: str, told: Mapping[str, Any] | None, alphas: Mapping[str, float]) -> None:
    """ValueError unless the scale is told exactly once."""
    if told is None and not alphas and prefix.startswith("base_model."):
        raise ValueError("it lacks adapter_config.json, where peft wrote the scale: put it beside it")
    if told is not None and (alphas or prefix == "converted"):
        raise ValueError("it tells its scale in settings and in its tensors: remove the wrong one")
    if wrong := [layer for layer, alpha in alphas.items() if not 0 < alpha < math.inf]:
        raise ValueError(f"its alpha of {some(wrong)} is {alphas[min(wrong)]}, and a positive number is wanted")


def _told(file: Path, metadata: Mapping[str, str], component: str) -> tuple[dict[str, Any] | None, str]:
    """Settings in the file's metadata, by diffusers, or beside it, by peft; and which of the two."""
    beside = file.parent / "adapter_config.json"
    written, where = metadata.get("lora_adapter_metadata"), "the file's metadata"
    if written is None and beside.is_file():
        written, where = beside.read_text(encoding="utf-8"), beside.name
    if written is None:
        return None, ""
    try:
        said = dict(json.loads(written))
    except ValueError as error:
        raise ValueError(f"its settings are no JSON ({error})") from error
    return {name.removeprefix(f"{component}."): value for name, value in said.items()}, where


def _settings(told: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are honoured; ValueError for one that would do something and is not."""
    from peft import LoraConfig

    if (kind := told.get("peft_type") or "LORA") != "LORA":
        raise ValueError(f"it is a {kind}, and only LoRA is known")
    if (start := told.get("init_lora_weights")) not in HARMLESS_STARTS:
        raise ValueError(f"it moved the base as it began ({start}): save it converted to a plain LoRA")
    usual = LoraConfig().to_dict()
    for name, value in told.items():
        if name not in HONOURED and name not in IRRELEVANT and (value or None) != (usual.get(name) or None):
            raise ValueError(f"it has {name}={value!r}, which is not known here: save it without")
    return {name: told[name] for name in HONOURED if name in told}


def _inferred(tensors: Tensors, alphas: Mapping[str, float]) -> dict[str, Any]:
    """Of a file that tells none: each layer's rank by its shape, and its alpha, which is the rank unless given."""
    ranks = {n.removesuffix(f".{DOWN}"): len(v) for n, v in tensors.items() if n.endswith(f".{DOWN}")}
    if lonely := alphas.keys() - ranks.keys():
        raise ValueError(f"it has an alpha of {some(lonely)} and no {DOWN} there")
    alphas = {layer: alphas.get(layer, rank) for layer, rank in ranks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] if ranks else 1 for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(layer)}": r for layer, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(layer)}": a for layer, a in alphas.items() if a != alpha},
        "use_dora": any("lora_magnitude_vector" in name for name in tensors),
        "lora_bias": any(name.endswith(".lora_B.bias") for name in tensors),
    }


def _exactly(tensors: Tensors) -> str:
    """A regular expression of the layers' names: an end of a name may be that of other layers too."""
    layers = {found[0] for name in tensors if (found := split(name)) is not None}
    return "|".join(sorted(map(re.escape, layers)))
