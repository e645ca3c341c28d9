"""Keys of LoRA files, to the names of the network's layers and of the parts that peft has.

| keys | written by |
|---|---|
| transformer.LAYER.lora_A.weight, unet. ... | diffusers' pipelines, ai-toolkit |
| LAYER.lora_A.weight | save_lora_adapter of diffusers' models |
| base_model.model.LAYER.lora_A.weight | peft |
| unet.LAYER.processor.to_q_lora.down.weight | diffusers before peft |
| diffusion_model.LAYER.lora_A.weight | ai-toolkit, ComfyUI, where they have the network's own names |
| lora_unet_LAYER_WITH_BARS.lora_down.weight, lora_transformer_..., lycoris_... | kohya, OneTrainer, LyCORIS, A1111 |
| names of the model's first release (sgm, FLUX, ...) under the last two, XLabs | trainers; diffusers renames these |

The network's own names are taken as they are: bars for dots are undone by comparing with its layers, exactly. Names of
a first release are diffusers' to convert, and what it makes of them is taken only if nothing of the LoRA was lost.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.models import hub
from rlflow.models.pretrained.adapter import Adapter

Tensors = dict[str, Tensor]
DOWN, UP, BIAS, SIZES, ALPHA = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "alpha"
"""Parts of a layer's LoRA, as peft names them; alpha is no tensor there."""
SPELLINGS = {
    DOWN: (r"lora_A(\.default)?\.weight", r"(lora[_.])?down\.weight"),
    UP: (r"lora_B(\.default)?\.weight", r"(lora[_.])?up\.weight"),
    BIAS: (r"lora_B(\.default)?\.bias",),
    SIZES: (r"lora_magnitude_vector(\.default)?(\.weight)?", r"dora_scale"),
    ALPHA: (r"alpha",),
}
PARTS = {part: re.compile(rf"(?P<layer>.+)\.({'|'.join(spellings)})") for part, spellings in SPELLINGS.items()}
BEFORE_PEFT = re.compile(r"[._]lora\.(down|up)\.weight$")
DOTTED = (
    *("transformer.", "unet.", "diffusion_model.", "base_model.model.transformer.", "base_model.model.unet."),
    *("base_model.model.", ""),
)
BARRED = ("lora_unet_", "lora_transformer_", "lycoris_")
KEPT = 0.01
"""Relative difference of what a conversion may make of the sum of squares: tensors of 16 bits are scaled in them."""


def split(key: str) -> tuple[str, str] | None:
    """(layer, part) of a key; None of one that is no part of a LoRA."""
    for part, pattern in PARTS.items():
        if match := pattern.fullmatch(key):
            return match["layer"], part
    return None


def by_layer(raw: Tensors, border: Adapter) -> tuple[str, Tensors]:
    """How the keys begin, and the tensors under LAYER.PART; ValueError says which keys stand in the way."""
    modules = dict(border.network.named_modules())
    raw = _peft_names(raw) if any(BEFORE_PEFT.search(key) for key in raw) else raw
    network = type(border.network).__name__
    parts = {key: found for key in raw if (found := split(key)) is not None}
    if strange := [key for key in raw if key not in parts] or ([] if raw else ["none at all"]):
        raise ValueError(_unknown(strange, network))
    for form in (_dotted, _barred, _sgm):
        if (known := form({layer for layer, _ in parts.values()}, modules, border)) is not None:
            prefix, names = known
            named = {}
            for key, (layer, part) in parts.items():
                named[f"{names[layer]}.{part}"] = _shaped(key, raw[key], part, modules[names[layer]])
            if len(named) < len(raw):
                raise ValueError(f"it has tensors twice, under names that mean the same: {some(raw)}")
            return prefix, named
    if (converted := _converted(raw, parts, modules, border)) is not None:
        return "converted", converted
    raise ValueError(_other_model(parts, modules, network))


def _peft_names(raw: Tensors) -> Tensors:
    from diffusers.utils import convert_unet_state_dict_to_peft

    found: Tensors = convert_unet_state_dict_to_peft(raw)
    return found


# -- the network's own names ----------------------------------------------------------------------

Names = tuple[str, Mapping[str, str]]
"""The prefix of all layers as a file calls them, and of each the network's name."""


def _dotted(layers: Collection[str], modules: Mapping[str, nn.Module], border: Adapter) -> Names | None:
    for prefix in DOTTED:
        if all(layer.startswith(prefix) and layer.removeprefix(prefix) in modules for layer in layers):
            return prefix, {layer: layer.removeprefix(prefix) for layer in layers}
    return None


def _barred(layers: Collection[str], modules: Mapping[str, nn.Module], border: Adapter) -> Names | None:
    """Bars in place of the dots; none of two layers that are the same then."""
    plain: dict[str, list[str]] = {}
    for name in modules:
        plain.setdefault(name.replace(".", "_"), []).append(name)
    for prefix in BARRED:
        found = [plain.get(layer.removeprefix(prefix), []) for layer in layers if layer.startswith(prefix)]
        if len(found) == len(layers) and all(len(names) == 1 for names in found):
            return prefix, {layer: names[0] for layer, names in zip(layers, found, strict=True)}
    return None


def _sgm(layers: Collection[str], modules: Mapping[str, nn.Module], border: Adapter) -> Names | None:
    """Of a UNet's first release, as diffusers renames them: it is given a number for each layer, and says where to."""
    if border.component != "unet" or not all(layer.startswith("lora_unet_") for layer in layers):
        return None
    order = sorted(layers)
    ends = ("lora_down.weight", "lora_up.weight")
    numbers = {f"{layer}.{end}": torch.tensor(float(i)) for i, layer in enumerate(order) for end in ends}
    try:
        with hub.quiet():
            state, _ = type(border.pipe).lora_state_dict(numbers, unet_config=border.network.config)
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(_refused(border, error, layers)) from error
    renamed = _peft_names({key.removeprefix("unet."): value for key, value in state.items()})
    names = {order[int(v)]: key.removesuffix(f".{DOWN}") for key, v in renamed.items() if key.endswith(DOWN)}
    whole = len(set(names.values())) == len(names) == len(layers)
    return ("lora_unet_", names) if whole and all(name in modules for name in names.values()) else None


def _shaped(key: str, value: Tensor, part: str, layer: nn.Module) -> Tensor:
    """In as many dimensions as the layer's weight has: a convolution of 1 x 1 and a linear layer are written alike."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or part in (BIAS, ALPHA):
        return value
    if part == SIZES:
        if value.numel() != len(weight) or (value.ndim == 2 and value.shape[0] == 1 < len(weight)):
            raise ValueError(
                f"{key} is of shape {tuple(value.shape)}, and {len(weight)} sizes are wanted, one an output"
            )
        return value.reshape(1, -1, 1, 1) if weight.ndim == 4 else value.flatten()
    if value.ndim == 4 and value.shape[2:] == (1, 1) and weight.ndim == 2:
        return value.flatten(1)
    return value[..., None, None] if value.ndim == 2 and weight.ndim == 4 else value


# -- names of a model's first release ---------------------------------------------------------------


def _converted(
    raw: Tensors, parts: Mapping[str, tuple[str, str]], modules: Mapping[str, nn.Module], border: Adapter
) -> Tensors | None:
    """By the pipeline's own loader; None unless all it made is of the network's layers, and is all of the LoRA."""
    if border.component == "unet" or any(part not in (DOWN, UP, ALPHA) for _, part in parts.values()):
        return None  # other parts it would leave out with a remark in its log
    own = {key: value.clone() for key, value in raw.items()}  # Wan's converter scales them where they lie
    try:
        with hub.quiet():
            found: Tensors = type(border.pipe).lora_state_dict(own)
    except (ValueError, KeyError, IndexError, NotImplementedError, AssertionError, RuntimeError) as error:
        raise ValueError(_refused(border, error, raw)) from error
    named = {key.removeprefix("transformer."): value for key, value in found.items()}
    after = {key: split_ for key in named if (split_ := split(key)) is not None}
    if len(after) < len(named) or any(layer not in modules for layer, _ in after.values()):
        return None
    (before, num), (now, num_now) = _squares(raw, parts), _squares(named, after)
    if num_now < num or abs(now - before) > KEPT * before:
        raise ValueError(
            f"{type(border.pipe).__name__} makes {num_now} layers of its {num}, and the square of what they add was "
            f"{before:.4g} and is {now:.4g}: something of it is lost"
        )
    return named


def _squares(tensors: Mapping[str, Tensor], parts: Mapping[str, tuple[str, str]]) -> tuple[float, int]:
    """Sum of (alpha / rank)^2 |B A|^2 over layers, which fusing and splitting leave alone; and number of layers."""
    layers: dict[str, Tensors] = {}
    for key, (layer, part) in parts.items():
        layers.setdefault(layer, {})[part] = tensors[key]
    total = 0.0
    for layer, found in layers.items():
        if not {DOWN, UP} <= found.keys():
            raise ValueError(f"it has not both halves of {layer}")
        a, b = (found[part].double().flatten(1) for part in (DOWN, UP))
        scale = float(found[ALPHA]) / len(a) if ALPHA in found else 1.0
        total += scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
    return total, len(layers)


# -- what is said -----------------------------------------------------------------------------------


def some(names: Iterable[str]) -> str:
    """The first of them, and how many more."""
    first, *rest = sorted(names) or ["none at all"]
    return f"{first!r}" + (f" and {len(rest)} more" if rest else "")


def _unknown(keys: Collection[str], network: str) -> str:
    return (
        f"it has keys that are not known for {network}: {some(keys)}. Convert it to diffusers' form, as "
        "save_lora_weights writes it: transformer.LAYER.lora_A.weight and .lora_B.weight"
    )


def _other_model(parts: Mapping[str, tuple[str, str]], modules: Collection[str], network: str) -> str:
    """The layer that the network lacks, under the prefix of most of the others."""
    layers = {layer for layer, _ in parts.values()}
    for prefix in DOTTED[:-1]:
        strange = [name.removeprefix(prefix) for name in layers if name.startswith(prefix)]
        if len(strange) == len(layers):
            lacking = [name for name in strange if name not in modules]
            return f"it is of another model: {network} has no layer {min(lacking)}" + (
                f", and {len(lacking) - 1} more are unknown" if len(lacking) > 1 else ""
            )
    return _unknown(list(parts), network)


def _refused(border: Adapter, error: Exception, keys: Iterable[str]) -> str:
    why = " ".join(str(error).split())[:200]
    return f"{type(border.pipe).__name__} cannot read its keys {some(keys)}: {why}"
