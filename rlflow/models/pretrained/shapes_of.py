"""Text-to-image models as shapes: a field without storage from the numbers of `known`, so that `plan` loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.models.pretrained.known import known
from rlflow.models.pretrained.pipeline import DTYPES, PretrainedField, add_lora, family


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
        transformer = getattr(diffusers, model.transformer).from_config(dict(model.numbers))
        nn.Module.to(transformer, dtype)  # that of diffusers warns of layers it does not have
        vae = diffusers.AutoencoderKL.from_config(dict(model.vae)).requires_grad_(False)
        pipe: Any = SimpleNamespace(vae=vae, **{model.component: transformer})
        border = family(model.pipeline)(pipe)
        if settings.get("lora") is not None:
            add_lora(border, settings["lora"], settings.get("lora_alpha"), settings.get("lora_modules"))
    pipe.scheduler = getattr(diffusers, model.scheduler_class).from_config(dict(model.scheduler))
    border.check(checkpoint)
    pipe.vae.to = lambda *_: pipe.vae  # what has no storage is nowhere
    pipe.encoder_parameters = model.encoders
    pipe.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    pipe.default_sample_size = transformer.config.get("sample_size", 128)  # FLUX names none
    if settings.get("vae_tiling"):
        pipe.vae.enable_tiling()
    length = settings.get("max_sequence_length") or border.max_sequence_length
    field = PretrainedField(border, dict(settings), settings.get("resolution") or border.default_resolution)
    tokens = model.clip_tokens + length
    field.table = NoText(tokens, field.num_features, border.text_width)  # type: ignore[assignment]
    return field


def encoder_bytes(field: nn.Module) -> int:
    """Of the text encoders of a field of `shape_of`, in the precision of its weights; 0 of any other."""
    if not isinstance(field, PretrainedField):
        return 0
    numbers = sum(field.adapter.pipe.encoder_parameters.values())
    return int(numbers * DTYPES[field.args.get("weights", "float32")].itemsize)


def releases_encoders(field: nn.Module) -> bool:
    """Whether a field of `shape_of` encodes all texts before it trains, and lets go of the encoders."""
    return isinstance(field, PretrainedField) and bool(field.args.get("release_encoders"))


def beside(field: nn.Module) -> list[nn.Module]:
    """Networks of a field that are no parts of it: the VAE."""
    return [field.adapter.pipe.vae] if isinstance(field, PretrainedField) else []
