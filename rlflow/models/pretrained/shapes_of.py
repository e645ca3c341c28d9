"""Text-to-image models as shapes: a field without storage from the numbers of `known`, so that `plan` loads nothing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.models import hub
from rlflow.models.pretrained.known import Known, known
from rlflow.models.pretrained.pipeline import DTYPES, PretrainedField, add_lora, family, frame

BITS = {"int8": 8.0, "nf4": 4.5}
"""Of a number; the four-bit ones come 64 to a float32 scale."""


class NoText:
    """Stands in for the table of encoded prompts: zeros of their shapes."""

    def __init__(self, tokens: int, pooled: int, width: int = 4096):
        self.tokens, self.pooled, self.width = tokens, pooled, width

    def __call__(self, numbers: Tensor) -> dict[str, Tensor]:
        """Of prompt numbers (N,)."""
        n = len(numbers)
        return {"tokens": torch.zeros(n, self.tokens, self.width), "pooled": torch.zeros(n, self.pooled)}

    def numbers(self, texts: list[str]) -> Tensor:
        """Any number will do."""
        return torch.zeros(len(texts), dtype=torch.long)


def shape_of(checkpoint: str, settings: Mapping[str, Any]) -> PretrainedField:
    """The field of a recipe's `policy.field` on the meta device; ValueError for a model that is not known."""
    import diffusers

    model, dtype = known(checkpoint), DTYPES[settings.get("weights", "float32")]
    with torch.device("meta"):
        network = getattr(diffusers, model.transformer).from_config(dict(model.numbers))
        _to(network, dtype)
        vae = getattr(diffusers, model.vae_class).from_config(dict(model.vae)).requires_grad_(False)
    plan = getattr(diffusers, model.scheduler_class).from_config(dict(model.scheduler))
    pipe = _pipeline(model, {model.component: network, "vae": vae, "scheduler": plan})
    border = family(model.pipeline)(pipe)
    border.check(checkpoint)
    frame(border, checkpoint, *(settings.get(name) for name in ("resolution", "width", "frames")))
    with torch.device("meta"):
        if settings.get("lora") is not None:
            add_lora(border, settings["lora"], settings.get("lora_alpha"), settings.get("lora_modules"))
    if settings.get("vae_tiling"):
        pipe.vae.enable_tiling()
    length = settings.get("max_sequence_length") or border.max_sequence_length
    args = {**settings, "checkpoint": checkpoint}
    made = PretrainedField(border, args, settings.get("resolution") or border.default_resolution)
    made.table = NoText(model.clip_tokens + length, made.num_features, border.text_width)  # type: ignore[assignment]
    return made


def _to(network: nn.Module, dtype: torch.dtype) -> None:
    """In a precision as loading brings it there: some families keep norms and the time in float32."""
    nn.Module.to(network, dtype)  # that of diffusers warns of layers it does not have
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, module in network.named_modules():
        if kept & set(name.split(".")):
            nn.Module.to(module, torch.float32)
    for module in network.modules():
        for name, own in module.named_parameters(recurse=False):
            own.data = own.data.float() if name in kept else own.data


def _pipeline(model: Known, parts: Mapping[str, Any]) -> Any:
    """The stock pipeline, without encoders and tokenizers; its VAE is nowhere, having no storage."""
    import diffusers

    with hub.quiet():
        kind = getattr(diffusers, model.pipeline)
        asked = inspect.signature(kind.__init__).parameters.values()
        absent = [p.name for p in asked if p.default is p.empty and p.name not in {"self", *parts}]
        pipe: Any = kind(**parts, **dict.fromkeys(absent), **model.settings)
    pipe.vae.to = lambda *_: pipe.vae
    pipe.encoder_parameters = model.encoders
    return pipe


def encoder_bytes(field: nn.Module) -> int:
    """Of the text encoders of a field of `shape_of`, in the precision of its weights; 0 of any other."""
    if not isinstance(field, PretrainedField):
        return 0
    numbers = sum(field.adapter.pipe.encoder_parameters.values())
    return int(numbers * DTYPES[field.args.get("weights", "float32")].itemsize)


def quantised_saving(field: nn.Module) -> float:
    """Bytes that a base takes less for being quantised: its linear layers, but for the largest, which is made whole
    where it runs."""
    kind = field.args.get("quantize") if isinstance(field, PretrainedField) else None
    if kind is None:
        return 0.0
    layers = [m.weight for m in field.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    saved = sum(w.numel() * (w.itemsize - BITS[kind] / 8) for w in layers)
    return float(saved - max(w.numel() * w.itemsize for w in layers))


def releases_encoders(field: nn.Module) -> bool:
    """Whether a field of `shape_of` encodes all texts before it trains, and lets go of the encoders."""
    return isinstance(field, PretrainedField) and bool(field.args.get("release_encoders"))


def beside(field: nn.Module) -> list[nn.Module]:
    """Networks of a field that are no parts of it: the VAE."""
    return [field.adapter.pipe.vae] if isinstance(field, PretrainedField) else []
