"""Models of images and videos as numbers: published ones from a table, a local one from the json files of its folder.

No weights are read and nothing is fetched; `shapes_of` builds a network without storage from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlflow.models.pretrained.opening import is_pipeline
from rlflow.models.pretrained.pipeline import adapter_of

SD3 = "StableDiffusion3Pipeline"
QWEN3_4B, QWEN3_8B, QWEN25_VL_7B, MISTRAL_24B = 4_022_468_096, 8_190_735_360, 8_292_166_656, 24_011_361_280
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
    """A pipeline's class, the network's class and configuration, the scheduler's, the VAE's, how many CLIP tokens
    stand before T5's, the parameters of each text encoder, and what else model_index.json says."""

    pipeline: str
    transformer: str
    numbers: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    clip_tokens: int
    encoders: Mapping[str, int]
    vae: Mapping[str, Any]
    vae_class: str = "AutoencoderKL"
    settings: Mapping[str, Any] = field(default_factory=dict)
    component: str = "transformer"
    scheduler_class: str = "FlowMatchEulerDiscreteScheduler"


CLIP_L, CLIP_G, T5_XXL = 123_650_304, 694_659_840, 4_762_310_656
CLIP_H = 340_387_840  # 23 layers, and no projection
SD3_TEXT = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL}
FLUX_TEXT = {"text_encoder": CLIP_L - 768 * 768, "text_encoder_2": T5_XXL}  # its CLIP has no projection
STATIC = {"shift": 3.0}
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
TO_02 = {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}


def _sd3(heads: int, places: int, **more: Any) -> Known:
    """As many layers as heads of 64 numbers, positions on a square of `places` patches a side."""
    numbers = {
        "sample_size": 128,
        "num_layers": heads,
        "num_attention_heads": heads,
        "caption_projection_dim": 64 * heads,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": places,
        **more,
    }
    return Known(SD3, "SD3Transformer2DModel", numbers, STATIC, 77, SD3_TEXT, VAE)


def _flux(scheduler: Mapping[str, Any], guidance: bool) -> Known:
    return Known("FluxPipeline", "FluxTransformer2DModel", {"guidance_embeds": guidance}, scheduler, 0, FLUX_TEXT, VAE)


def _flux2(pipeline: str, encoder: int, numbers: Mapping[str, Any], settings: Mapping[str, Any]) -> Known:
    text = {"text_encoder": encoder}
    return Known(pipeline, "Flux2Transformer2DModel", numbers, DYNAMIC, 0, text, {}, "AutoencoderKLFlux2", settings)


def _klein(double: int, single: int, heads: int, encoder: int, distilled: bool) -> Known:
    """As many blocks of each kind, and heads of 128 numbers."""
    numbers = {"num_layers": double, "num_single_layers": single, "num_attention_heads": heads}
    numbers |= {"joint_attention_dim": 7680 if encoder == QWEN3_4B else 12288, "guidance_embeds": False}
    return _flux2("Flux2KleinPipeline", encoder, numbers, {"is_distilled": distilled})


def _z_image(shift: float) -> Known:
    numbers, text = {"axes_lens": [1536, 512, 512]}, {"text_encoder": QWEN3_4B}
    return Known("ZImagePipeline", "ZImageTransformer2DModel", numbers, {"shift": shift}, 0, text, VAE)


def _qwen_image() -> Known:
    network, text = "QwenImageTransformer2DModel", {"text_encoder": QWEN25_VL_7B}
    return Known("QwenImagePipeline", network, {}, TO_02, 0, text, {}, "AutoencoderKLQwenImage")


UMT5_XXL = 5_680_910_336
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
"""Wan 2.1's, as it ships."""


def _wan(heads: int, layers: int, inner: int) -> Known:
    """Heads of 128 numbers, layers, width of the feed-forward."""
    numbers = {"num_attention_heads": heads, "num_layers": layers, "ffn_dim": inner}
    names, text = ("WanPipeline", "WanTransformer3DModel"), {"text_encoder": UMT5_XXL}
    return Known(*names, numbers, UNIPC, 0, text, {}, "AutoencoderKLWan", scheduler_class="UniPCMultistepScheduler")


NO_CHECKER = {"requires_safety_checker": False}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""Of Stable Diffusion's schedulers, which write more settings than they read."""
UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
OLD_VAE = {**VAE, "latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": 0.18215}


def _sd(sample: int, heads: int | tuple[int, ...], text: int, encoder: int, predicts: str = "epsilon") -> Known:
    """Latents a side, attention's heads, width and parameters of the text encoder."""
    numbers = {**UNET, "sample_size": sample, "attention_head_dim": heads, "cross_attention_dim": text}
    numbers["use_linear_projection"] = text != 768
    scheduler, encoders = {**BETAS, "prediction_type": predicts}, {"text_encoder": encoder}
    vae = {**OLD_VAE, "sample_size": 8 * sample}
    names, kinds = ("StableDiffusionPipeline", "UNet2DConditionModel"), {"scheduler_class": "PNDMScheduler"}
    return Known(*names, numbers, scheduler, 77, encoders, vae, component="unet", settings=NO_CHECKER, **kinds)


SDXL = Known(
    "StableDiffusionXLPipeline",
    "UNet2DConditionModel",
    {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    {**BETAS, "timestep_spacing": "leading"},
    77,
    {"text_encoder": CLIP_L - 768 * 768, "text_encoder_2": CLIP_G},
    {**OLD_VAE, "scaling_factor": 0.13025, "force_upcast": True},
    component="unet",
    scheduler_class="EulerDiscreteScheduler",
)

KNOWN = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(24, 192),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(
        24, 384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))
    ),
    "stabilityai/stable-diffusion-3.5-large": _sd3(38, 192, qk_norm="rms_norm"),
    "stabilityai/stable-diffusion-3.5-large-turbo": _sd3(38, 192, qk_norm="rms_norm"),
    "black-forest-labs/FLUX.1-dev": _flux(DYNAMIC, guidance=True),
    "black-forest-labs/FLUX.1-schnell": _flux({"shift": 1.0}, guidance=False),
    "black-forest-labs/FLUX.2-dev": _flux2("Flux2Pipeline", MISTRAL_24B, {}, {}),
    "black-forest-labs/FLUX.2-klein-base-4B": _klein(5, 20, 24, QWEN3_4B, distilled=False),
    "black-forest-labs/FLUX.2-klein-base-9B": _klein(8, 24, 32, QWEN3_8B, distilled=False),
    "black-forest-labs/FLUX.2-klein-4B": _klein(5, 20, 24, QWEN3_4B, distilled=True),
    "black-forest-labs/FLUX.2-klein-9B": _klein(8, 24, 32, QWEN3_8B, distilled=True),
    "Tongyi-MAI/Z-Image": _z_image(6.0),
    "Tongyi-MAI/Z-Image-Turbo": _z_image(3.0),
    "Qwen/Qwen-Image": _qwen_image(),
    "Qwen/Qwen-Image-2512": _qwen_image(),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan(12, 30, 8960),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan(40, 40, 13824),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _sd(64, 8, 768, CLIP_L - 768 * 768),
    "stabilityai/stable-diffusion-2-1": _sd(96, (5, 10, 20, 20), 1024, CLIP_H, "v_prediction"),
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
}


def known(checkpoint: str) -> Known:
    """Of a hub id in the table, or of a local folder; ValueError for any other."""
    if is_pipeline(checkpoint):
        return _local(Path(checkpoint))
    if checkpoint not in KNOWN:
        raise ValueError(
            f"plan knows the shapes of {sorted(KNOWN)}, and of folders that save_pretrained wrote, and not of "
            f"{checkpoint!r}"
        )
    return KNOWN[checkpoint]


def _local(folder: Path) -> Known:
    index = _read(folder / "model_index.json")
    adapter_of(str(folder))  # or it is none that there is an adapter for
    component = "unet" if "unet" in index else "transformer"
    clip = component == "unet" or index["_class_name"] == SD3
    return Known(
        index["_class_name"],
        index[component][1],
        _read(folder / component / "config.json"),
        _read(folder / "scheduler" / "scheduler_config.json"),
        _read(folder / "tokenizer" / "tokenizer_config.json")["model_max_length"] if clip else 0,
        {name: _parameters(folder / name, index[name][1]) for name in index if _is_encoder(name, index[name])},
        _read(folder / "vae" / "config.json"),
        index["vae"][1],
        {name: v for name, v in index.items() if not name.startswith("_") and not isinstance(v, list)},
        component,
        index["scheduler"][1],
    )


def _read(path: Path) -> dict[str, Any]:
    """ValueError that names the file where it is missing."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the folder that save_pretrained wrote")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _is_encoder(name: str, entry: Any) -> bool:
    """Whether an entry of model_index.json is a text encoder that the folder has."""
    return name.startswith("text_encoder") and entry[1] is not None


def _parameters(folder: Path, kind: str) -> int:
    """Of a network of transformers, from its config.json."""
    import transformers

    network = getattr(transformers, kind)
    with torch.device("meta"):
        made = network(network.config_class(**_read(folder / "config.json")))
    return sum(p.numel() for p in made.parameters())
