"""LoRA files that others wrote, in one form: peft's settings, and the tensors by the names of the transformer's layers.

| keys | written by | the scale is in |
|---|---|---|
| transformer.LAYER.lora_A.weight | diffusers' pipelines | the file's metadata, LAYER.alpha, or it is 1 |
| LAYER.lora_A.weight | save_lora_adapter of diffusers' models | the same |
| base_model.model.LAYER.lora_A.weight | peft | adapter_config.json |
| what the pipeline's own loader renames (FLUX's: of kohya, ComfyUI, XLabs) | trainers | it goes into the tensors |

A file is taken whole or refused: a part that is left out changes every picture and nobody is told.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rlflow.models import hub
from rlflow.models.pretrained.lora import WEIGHTS

Tensors = dict[str, Tensor]
NAMES = (WEIGHTS, "adapter_model.safetensors")
"""What diffusers and peft call the file."""
PREFIXES = ("transformer.", "base_model.model.transformer.", "base_model.model.", "")
PART = re.compile(r"(?P<layer>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector(\.weight)?|alpha)")
TEXT = ("text_encoder", "lora_te", "text_model.")
"""How the keys of a text encoder's LoRA begin."""
RENAMED = re.compile(
    r"(lora_unet_|lora_transformer_|diffusion_model\.|base_model\.model\.|(double|single)_blocks\.)"
    r".+\.((lora_)?(down|up)\.weight|lora_[AB]\.weight|alpha)"
)
"""Keys that FLUX's own loader takes all of; others it leaves out with a remark in its log."""

DOWN = re.compile(r"(down|lora_A)\.weight$")

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


def read_lora(source: str, pipe: Any) -> tuple[dict[str, Any], Tensors]:
    """Settings for peft's LoraConfig, and LAYER.lora_A.weight ...; ValueError says which keys stand in the way."""
    file = _file(source)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        raw = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from error
    _check_text(raw)
    prefix, tensors = _by_layer(raw, pipe)
    alphas = {n.removesuffix(".alpha"): float(tensors.pop(n)) for n in list(tensors) if n.endswith(".alpha")}
    told = _told(file, metadata)
    _check_scale(prefix, told, alphas)
    settings = _inferred(tensors, alphas) if told is None else _settings(told)
    return settings | {"target_modules": _exactly(tensors)}, tensors


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


# -- keys -----------------------------------------------------------------------------------------


def _check_text(raw: Collection[str]) -> None:
    if text := [name for name in raw if name.startswith(TEXT) or ".text_model." in name]:
        raise ValueError(
            f"it holds LoRA of a text encoder too ({_some(text)}), and only the transformer's would be "
            f"used: remove those {len(text)} tensors if it is meant to work without them"
        )


def _by_layer(raw: Tensors, pipe: Any) -> tuple[str, Tensors]:
    """The prefix of all keys, and the tensors under LAYER.lora_A.weight ... and LAYER.alpha."""
    layers = {name for name, _ in pipe.transformer.named_modules()}
    if (found := _stripped(raw, layers)) is not None:
        return found
    one_form = len({name.startswith("lora_transformer_") for name in raw}) == 1
    if one_form and all(RENAMED.fullmatch(name) for name in raw):
        with hub.quiet():
            converted = _stripped(_renamed(raw, pipe), layers)
        if converted is not None and len(_layers(converted[1])) >= sum(DOWN.search(name) is not None for name in raw):
            return "renamed", converted[1]
    raise ValueError(_what_is_wrong(raw, layers, type(pipe.transformer).__name__))


def _what_is_wrong(raw: Tensors, layers: Collection[str], network: str) -> str:
    for name in raw:
        match = PART.fullmatch(name.removeprefix("transformer."))
        if match and name.startswith("transformer.") and match["layer"] not in layers:
            return f"it is of another model: {network} has no layer {match['layer']}"
    strange = [name for name in raw if not PART.fullmatch(name)] or list(raw)
    return (
        f"it has keys that are not known for {network}: {_some(strange)}. Convert it to diffusers' form, as "
        "save_lora_weights writes it: transformer.LAYER.lora_A.weight and .lora_B.weight"
    )


def _stripped(raw: Tensors, layers: Collection[str]) -> tuple[str, Tensors] | None:
    """The one prefix under which every key is a part of a layer's LoRA, and the rest of the keys; None without one."""
    for prefix in PREFIXES:
        matches = [PART.fullmatch(n.removeprefix(prefix)) if n.startswith(prefix) else None for n in raw]
        if raw and all(m is not None and m["layer"] in layers for m in matches):
            return prefix, {name.removeprefix(prefix): value for name, value in raw.items()}
    return None


def _renamed(raw: Tensors, pipe: Any) -> Tensors:
    """By the pipeline's own loader, where it has one for these keys."""
    try:
        found: Tensors = type(pipe).lora_state_dict(dict(raw))
    except (ValueError, KeyError, NotImplementedError, AssertionError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{type(pipe).__name__} cannot read its keys {_some(raw)}: {why}") from error
    return found


def _layers(tensors: Iterable[str]) -> set[str]:
    return {m["layer"] for name in tensors if (m := PART.fullmatch(name))}


def _some(names: Iterable[str]) -> str:
    first, *rest = sorted(names) or ["none at all"]
    return f"{first!r}" + (f" and {len(rest)} more" if rest else "")


# -- settings -------------------------------------------------------------------------------------


def _check_scale(prefix: str, told: Mapping[str, Any] | None, alphas: Mapping[str, float]) -> None:
    """ValueError unless the scale is told exactly once."""
    if told is None and not alphas and prefix.startswith("base_model."):
        raise ValueError("it lacks adapter_config.json, where peft wrote the scale: put it beside it")
    if told is not None and (alphas or prefix == "renamed"):
        raise ValueError("it tells its scale in settings and in its tensors: remove the wrong one")


def _told(file: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Settings in the file's metadata, by diffusers, or beside it, by peft."""
    beside = file.parent / "adapter_config.json"
    written = metadata.get("lora_adapter_metadata") or (
        beside.read_text(encoding="utf-8") if beside.is_file() else None
    )
    if written is None:
        return None
    try:
        said = dict(json.loads(written))
    except ValueError as error:
        raise ValueError(f"its settings are no JSON ({error})") from error
    return {name.removeprefix("transformer."): value for name, value in said.items()}


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
    ranks = {n.removesuffix(".lora_A.weight"): len(v) for n, v in tensors.items() if n.endswith(".lora_A.weight")}
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
    return "|".join(sorted(map(re.escape, _layers(tensors))))
