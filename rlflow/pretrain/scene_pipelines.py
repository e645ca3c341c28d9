"""Small pipelines of diffusers for scenes, of three families: what each is made of before anything was learned.

Tokenizers know the captions' words, text encoders keep their random weights, and the network is around a VAE that was
trained. FORMATS names them, each with the way in which its VAE is told the scale of its latents.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.envs.captions import scenes
from rlflow.models.pretrained.families.packing import pack
from rlflow.models.pretrained.known import BETAS
from rlflow.models.pretrained.tiny import clip_text, clip_tokenizer, t5, t5_tokenizer
from rlflow.models.pretrained.tiny_language import qwen3, tokenizer

SIDE, WIDTH, HEADS, LAYERS = 32, 128, 4, 6
LENGTH = 10
"""Tokens of the longest caption, with its two ends."""


@dataclass(frozen=True)
class Format:
    """Of a family: its VAE, its pipeline around that, and the scale of latents, which the VAE keeps."""

    vae: Callable[[], Any]
    pipeline: Callable[[Any], Any]
    settle: Callable[[Any, Tensor], None]
    """(VAE, latents (N, C, H, W) as it encodes them): writes their scale where the pipeline reads it."""
    scaled: Callable[[Any, Tensor], Tensor]
    """(VAE, the same) to what the network makes, (N, *D) of about unit size: the inverse of `Adapter.for_vae`."""


# -- VAEs and their scales --------------------------------------------------------------------------


def autoencoder(kind: str, widths: tuple[int, ...], channels: int) -> Any:
    """A VAE of diffusers that halves the sides between `widths`."""
    import diffusers

    return getattr(diffusers, kind)(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=channels,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=SIDE,
    )


def plain_vae() -> Any:
    """16 x 16 latents of four channels."""
    return autoencoder("AutoencoderKL", (32, 64), 4)


def packed_vae() -> Any:
    """8 x 8 latents of four channels: 16 tokens of 16 numbers."""
    return autoencoder("AutoencoderKLFlux2", (16, 32, 64), 4)


def shifted(vae: Any, z: Tensor) -> None:
    """One factor, one shift."""
    vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())


def unshifted(vae: Any, z: Tensor) -> None:
    """One factor."""
    vae.register_to_config(scaling_factor=1 / z.square().mean().sqrt().item(), shift_factor=None)


def scaled(vae: Any, z: Tensor) -> Tensor:
    """By the factor and the shift."""
    return (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def normed(vae: Any, z: Tensor) -> None:
    """Mean and variance of each number of a token, in the VAE's batch norm."""
    numbers = pack(z).flatten(0, 1)
    vae.bn.running_mean.copy_(numbers.mean(0))
    vae.bn.running_var.copy_(numbers.var(0))


def packed(vae: Any, z: Tensor) -> Tensor:
    """Put together 2 x 2, each number by its own mean and variance."""
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return ((pack(z) - vae.bn.running_mean) / std).mT.unflatten(2, (z.shape[2] // 2, z.shape[3] // 2))


# -- pipelines --------------------------------------------------------------------------------------


def sd3(vae: Any) -> Any:
    """A StableDiffusion3Pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with tempfile.TemporaryDirectory() as folder:
        tokenizers = [clip_tokenizer(Path(folder) / str(i), scenes.VOCAB, LENGTH) for i in range(2)]
    encoders = [_spread(clip_text(tokenizer, width=WIDTH // 2)) for tokenizer in tokenizers]
    pieces = t5_tokenizer(scenes.VOCAB)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        qk_norm="rms_norm",
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=SIDE // 4,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5(pieces, width=WIDTH),
        tokenizer_3=pieces,
    )


def sd15(vae: Any) -> Any:
    """A StableDiffusionPipeline whose scheduler ends at the data."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = clip_tokenizer(Path(folder), scenes.VOCAB, LENGTH)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(WIDTH // 2, WIDTH),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=HEADS,
    )
    return StableDiffusionPipeline(
        unet=unet,
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True),
        vae=vae,
        text_encoder=_spread(clip_text(tokenizer, projection=False, width=WIDTH)),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


CHAT = "<|im_start|>{{ messages[0].content }}<|im_end|>"
"""A caption between its two ends: roles and thoughts would be most of the tokens."""
TEXT_WIDTH = WIDTH // 4
"""Of the language model, three layers of which are side by side."""


def klein(vae: Any) -> Any:
    """A Flux2KleinPipeline, not distilled. Its positions turn fast enough to tell four rows, and ten words, apart."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel

    words = tokenizer(scenes.VOCAB, scenes.VOCAB, CHAT)
    transformer = Flux2Transformer2DModel(
        in_channels=4 * vae.config.latent_channels,
        num_layers=1,
        num_single_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        joint_attention_dim=3 * TEXT_WIDTH,
        axes_dims_rope=(2, 10, 10, 10),
        rope_theta=10,
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
        vae=vae,
        text_encoder=_spread(qwen3(words, layers=27, width=TEXT_WIDTH)),
        tokenizer=words,
    )


@torch.no_grad()
def _spread(encoder: Any) -> Any:
    """Embeddings of size 1, which the start of a model's own training does not have, tell words and places apart."""
    for embedding in encoder.modules():  # of words, and of places
        if isinstance(embedding, nn.Embedding):
            embedding.weight.normal_()
    return encoder


FORMATS = {
    "sd3": Format(plain_vae, sd3, shifted, scaled),
    "sd15": Format(plain_vae, sd15, unshifted, scaled),
    "klein": Format(packed_vae, klein, normed, packed),
}
