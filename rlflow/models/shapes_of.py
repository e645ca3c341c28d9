"""Published text-to-image models as shapes: their configurations as numbers, so that `plan` downloads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.models import lora as lora_files
from rlflow.models.flux import Flux
from rlflow.models.pretrained import DTYPES, PretrainedField
from rlflow.models.sd3 import SD3

VAE = {
    "latent_channels": 16,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 1024,
}


@dataclass(frozen=True)
class Known:
    """A transformer's class and numbers, its scheduler's, how many CLIP tokens stand before T5's, and the parameters of
    its text encoders."""

    adapter: type
    transformer: str
    numbers: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    text_tokens: int
    encoders: Mapping[str, int]


SD35_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
CLIP_L, CLIP_G, T5_XXL = 123_650_304, 694_659_840, 4_762_310_656
SD3_TEXT = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL}
FLUX_TEXT = {"text_encoder": CLIP_L - 768 * 768, "text_encoder_2": T5_XXL}  # its CLIP has no projection
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
KNOWN = {
    "stabilityai/stable-diffusion-3.5-medium": Known(
        SD3, "SD3Transformer2DModel", SD35_MEDIUM, {"shift": 3.0}, 77, SD3_TEXT
    ),
    "black-forest-labs/FLUX.1-dev": Known(
        Flux, "FluxTransformer2DModel", {"guidance_embeds": True}, DYNAMIC, 0, FLUX_TEXT
    ),
}


class NoText:
    """Stands in for the table of encoded prompts: zeros of their shapes."""

    def __init__(self, tokens: int, pooled: int):
        self.tokens, self.pooled = tokens, pooled

    def __call__(self, numbers: Tensor) -> dict[str, Tensor]:
        """Of prompt numbers (N,)."""
        n = len(numbers)
        return {"tokens": torch.zeros(n, self.tokens, 4096), "pooled": torch.zeros(n, self.pooled)}

    def numbers(self, texts: list[str]) -> Tensor:
        """Any number will do."""
        return torch.zeros(len(texts), dtype=torch.long)


def shape_of(checkpoint: str, settings: Mapping[str, Any]) -> PretrainedField:
    """The field of a recipe's `policy.field` on the meta device; ValueError for a model that is not in the table."""
    import diffusers

    known, dtype = _known(checkpoint), DTYPES[settings.get("weights", "float32")]
    with torch.device("meta"):
        transformer = getattr(diffusers, known.transformer)(**known.numbers)
        nn.Module.to(transformer, dtype)  # that of diffusers warns of layers it does not have
        pipe: Any = SimpleNamespace(transformer=transformer, vae=diffusers.AutoencoderKL(**VAE).requires_grad_(False))
        border = known.adapter(pipe)
        if settings.get("lora") is not None:
            modules = settings.get("lora_modules") or list(border.modules)
            lora_files.attach(pipe, settings["lora"], settings.get("lora_alpha"), modules, None)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**known.scheduler)
    pipe.vae.to = lambda *_: pipe.vae  # what has no storage is nowhere
    pipe.encoder_parameters = known.encoders
    pipe.vae_scale_factor, pipe.default_sample_size = 8, 128
    if settings.get("vae_tiling"):
        pipe.vae.enable_tiling()
    length = settings.get("max_sequence_length") or border.max_sequence_length
    field = PretrainedField(border, dict(settings), settings.get("resolution") or border.default_resolution)
    field.table = NoText(known.text_tokens + length, field.num_features)  # type: ignore[assignment]
    return field


def _known(checkpoint: str) -> Known:
    if checkpoint not in KNOWN:
        raise ValueError(f"plan knows the shapes of {sorted(KNOWN)}, and not of {checkpoint!r}")
    return KNOWN[checkpoint]


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
