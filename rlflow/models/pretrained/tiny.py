"""Random checkpoints of a few thousand parameters in the real formats: to try a recipe before anything is downloaded.

`make_tiny("sd3", folder)` writes what `DiffusionPipeline.save_pretrained` writes for Stable Diffusion 3, or another of
KINDS: transformer, VAE, text encoders, tokenizers of single bytes, scheduler. Pictures are noise, all else is real.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from rlflow.files import as_readable
from rlflow.models.hub import quiet
from rlflow.models.pretrained import tiny_language
from rlflow.models.pretrained.known import BETAS, UNIPC
from rlflow.models.pretrained.tiny_parts import euler, moved, plain_vae

TEXT_WIDTH, POOLED = 32, 16


def make_tiny(kind: str, folder: str | Path, seed: int = 0, **scheduler: Any) -> Path:
    """Write a tiny pipeline of `kind`, one of KINDS, into `folder`; `scheduler` overrides its config."""
    if kind not in KINDS:
        raise ValueError(f"no tiny checkpoint of kind {kind!r}: choose from {sorted(KINDS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = KINDS[kind](Path(folder), scheduler)
    with quiet():
        pipeline.save_pretrained(folder)
    as_readable(Path(folder))
    return Path(folder)


def clip_tokenizer(folder: Path, words: Iterable[str] = (), length: int = 77) -> Any:
    """Every byte is a token, and so is each of `words` (lower case)."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges: dict[tuple[str, str], str] = {}
    for word in sorted(words, key=len, reverse=True):  # a shorter word's pairs would break up a longer one
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            left = merges.setdefault((left, right), left + right)
    letters = list(bytes_to_unicode().values())
    whole = dict.fromkeys(merges.values())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *whole, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)


def t5_tokenizer(words: Iterable[str] = ()) -> Any:
    """Every one of `words` is a piece, and every printable ASCII character."""
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", *("▁" + word for word in words), "▁", *map(chr, range(33, 127))]
    return T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def clip_text(tokenizer: Any, projection: bool = True, width: int = POOLED, heads: int = 2) -> Any:
    """A CLIP text encoder of two layers with random weights, for `tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": heads}
    end = tokenizer.eos_token_id
    ends = {"vocab_size": end + 1, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    length = tokenizer.model_max_length
    config = CLIPTextConfig(**sizes, **ends, projection_dim=width, max_position_embeddings=length)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(tokenizer: Any, width: int = TEXT_WIDTH) -> Any:
    """A T5 encoder of two layers with random weights, for `tokenizer`."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": width, "d_kv": width // 4, "d_ff": width, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(**sizes, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)).eval()


def _sd3(folder: Path, scheduler: dict[str, Any]) -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    text = {"joint_attention_dim": TEXT_WIDTH, "caption_projection_dim": 16, "pooled_projection_dim": 2 * POOLED}
    tokenizers = [clip_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
    pieces = t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=moved(SD3Transformer2DModel(**sizes, **heads, **text, pos_embed_max_size=16)),
        scheduler=euler(**{"shift": 3.0, **scheduler}),
        vae=plain_vae(4),
        text_encoder=clip_text(tokenizers[0]),
        tokenizer=tokenizers[0],
        text_encoder_2=clip_text(tokenizers[1]),
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5(pieces),
        tokenizer_3=pieces,
    )


def _flux(folder: Path, scheduler: dict[str, Any], guidance_embeds: bool = True) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 2, 2)}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "guidance_embeds": guidance_embeds}
    text = {"joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": POOLED}
    tokenizer, pieces = clip_tokenizer(folder / "tokenizer"), t5_tokenizer()
    return FluxPipeline(
        transformer=moved(FluxTransformer2DModel(**sizes, **heads, **text)),
        scheduler=euler(**{"shift": 3.0, "use_dynamic_shifting": True, **scheduler}),
        vae=plain_vae(4),
        text_encoder=clip_text(tokenizer, projection=False),
        tokenizer=tokenizer,
        text_encoder_2=t5(pieces),
        tokenizer_2=pieces,
    )


def _flux_schnell(folder: Path, scheduler: dict[str, Any]) -> Any:
    return _flux(folder, {"shift": 1.0, "use_dynamic_shifting": False, **scheduler}, guidance_embeds=False)


UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def _old_vae(scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL

    widths = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return AutoencoderKL(**widths, **blocks, latent_channels=4, scaling_factor=scaling_factor, sample_size=32).eval()


def _sd15(folder: Path, scheduler: dict[str, Any]) -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    tokenizer = clip_tokenizer(folder / "tokenizer")
    heads = {"cross_attention_dim": POOLED, "attention_head_dim": 2}
    return StableDiffusionPipeline(
        unet=moved(UNet2DConditionModel(**UNET, **blocks, **heads)),
        scheduler=PNDMScheduler(**{**BETAS, "skip_prk_steps": True, **scheduler}),
        vae=_old_vae(0.18215),
        text_encoder=clip_text(tokenizer, projection=False),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(folder: Path, scheduler: dict[str, Any]) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
    }
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
    }
    heads = {"cross_attention_dim": 2 * POOLED, "attention_head_dim": (2, 2)}
    tokenizers = [clip_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
    return StableDiffusionXLPipeline(
        unet=moved(UNet2DConditionModel(**UNET, **blocks, **added, **heads)),
        scheduler=EulerDiscreteScheduler(**{**BETAS, "timestep_spacing": "leading", **scheduler}),
        vae=_old_vae(0.13025),
        text_encoder=clip_text(tokenizers[0], projection=False),
        tokenizer=tokenizers[0],
        text_encoder_2=clip_text(tokenizers[1]),
        tokenizer_2=tokenizers[1],
        add_watermarker=False,
    )


def _wan(folder: Path, scheduler: dict[str, Any]) -> Any:
    """Wan 2.1, of videos, with the scheduler that it ships with."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    pieces = t5_tokenizer()
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    inner = {"text_dim": TEXT_WIDTH, "freq_dim": 32, "ffn_dim": 16, "rope_max_seq_len": 64}
    moments = {"latents_mean": torch.randn(4).tolist(), "latents_std": (0.5 + torch.rand(4)).tolist()}
    video = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True]}
    text = {"d_model": TEXT_WIDTH, "d_kv": TEXT_WIDTH // 4, "d_ff": TEXT_WIDTH, "num_layers": 2, "num_heads": 2}
    ends = {"vocab_size": len(pieces), "pad_token_id": 0, "eos_token_id": 1}
    return WanPipeline(
        transformer=moved(WanTransformer3DModel(**sizes, **inner)),
        scheduler=UniPCMultistepScheduler(**{**UNIPC, **scheduler}),
        vae=AutoencoderKLWan(**video, **moments, scale_factor_spatial=4).eval(),
        text_encoder=UMT5EncoderModel(UMT5Config(**text, **ends)).eval(),
        tokenizer=pieces,
    )


def _wan_euler(folder: Path, scheduler: dict[str, Any]) -> Any:
    """The same, saved with the scheduler of the other families."""
    pipeline = _wan(folder, {})
    pipeline.register_modules(scheduler=euler(**{"shift": 3.0, **scheduler}))
    return pipeline


KINDS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "sd3": _sd3,
    "flux": _flux,
    "flux_schnell": _flux_schnell,
    "klein": tiny_language.klein,
    "flux2_dev": tiny_language.flux2_dev,
    "z_image": tiny_language.z_image,
    "qwen_image": tiny_language.qwen_image,
    "wan": _wan,
    "wan_euler": _wan_euler,
    "sd15": _sd15,
    "sdxl": _sdxl,
}
