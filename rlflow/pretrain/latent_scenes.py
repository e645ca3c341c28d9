"""`rlflow pretrain sd3_scenes`, `sd15_scenes`: small models that draw scenes, in diffusers' own formats.

Of Stable Diffusion 3 (3.5 M parameters) or 1.5: tokenizers of the captions' words, text encoders with random weights
that stay, a VAE and a network that are trained here on drawings of envs/captions/scenes.py. For plain diffusers each
is a checkpoint like any other.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from rlflow.envs.captions import scenes
from rlflow.files import as_readable
from rlflow.flow.grid import uniform_times
from rlflow.flow.matching import cfm_loss
from rlflow.models.hub import quiet
from rlflow.models.pretrained.families.sd3 import SD3
from rlflow.models.pretrained.families.stable_diffusion import StableDiffusion
from rlflow.models.pretrained.known import BETAS
from rlflow.models.pretrained.pipeline import PretrainedField
from rlflow.models.pretrained.tiny import clip_text, clip_tokenizer, t5, t5_tokenizer
from rlflow.models.vp import noise_loss
from rlflow.parallel.dist import device
from rlflow.pretrain.images import judge_scenes
from rlflow.pretrain.matching import BEFORE_THE_MIDDLE, Times, pretrain, report
from rlflow.ranges import Count, argument

SIDE, CHANNELS, WIDTH, HEADS, LAYERS = 32, 4, 128, 4, 6
LENGTH = 10
"""Tokens of the longest caption, with its two ends."""
ROWS, VAE_ROWS = 64, 32
KL = 1e-4
"""Weight of the VAE's KL, a mean over latent numbers, beside its errors per pixel."""


def uniform_after(first_time: float) -> Times:
    """Training times of what a model knows, all alike."""
    return lambda num, rng: first_time + (1 - first_time) * uniform_times(num, rng)


@dataclass(frozen=True)
class LatentScenes:
    """What `rlflow pretrain` asks of a world; `make` writes a folder of a pipeline of diffusers."""

    name: str = "sd3_scenes"
    asset: str = "sd3_scenes"
    steps: int = 1200
    old: bool = False
    """Stable Diffusion 1.5, whose latents are not shifted and whose network predicts noise."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Steps of the VAE, and drawings a step of the transformer."""
        parser.add_argument("--vae-steps", type=argument(Count), default=300)
        parser.add_argument("--rows", type=argument(Count), default=ROWS)

    def make(self, out: Path, args: argparse.Namespace) -> dict[str, Any]:
        """Train the VAE, then the transformer; returns made_by.json's content."""
        torch.manual_seed(args.seed)
        begin = time.process_time()
        vae = train_vae(args.vae_steps, args.seed, shifted=not self.old)
        border = StableDiffusion(old_pipeline(vae)) if self.old else SD3(pipeline(vae))
        length = None if self.old else LENGTH
        field = PretrainedField(border, {}, SIDE, max_sequence_length=length, cache=len(scenes.all_scenes()) + 1)
        field.to(device())
        blocks = border.network if self.old else border.network.transformer_blocks
        averaged = pretrain(
            field,
            latents(field, args.rows, args.seed),
            steps=args.steps,
            hidden=[p for name, p in blocks.named_parameters() if p.ndim == 2 and "time_emb" not in name],
            seed=args.seed,
            times=uniform_after(field.first_time) if self.old else BEFORE_THE_MIDDLE,
            loss=noise_loss if self.old else cfm_loss,
            progress=report(args.steps),
        )
        judged = judge_scenes(averaged)
        with quiet():
            averaged.adapter.pipe.to("cpu").save_pretrained(out)
        as_readable(out)
        command = f"rlflow pretrain {self.name} --vae-steps {args.vae_steps} --rows {args.rows}"
        command += f" --steps {args.steps} --seed {args.seed}"
        made_by = {"command": command, "cpu_seconds": round(time.process_time() - begin), "torch": torch.__version__}
        made_by |= {"device": device().type, "reconstructed_strict": reconstructed(vae)} | judged
        (out / "made_by.json").write_text(json.dumps(made_by, indent=1), encoding="utf-8")
        return made_by


# -- the networks ---------------------------------------------------------------------------------


def pipeline(vae: nn.Module) -> Any:
    """A StableDiffusion3Pipeline around `vae` whose transformer knows nothing yet."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with tempfile.TemporaryDirectory() as folder:
        tokenizers = [clip_tokenizer(Path(folder) / str(i), scenes.VOCAB, LENGTH) for i in range(2)]
    encoders = [_spread(clip_text(tokenizer, width=WIDTH // 2)) for tokenizer in tokenizers]
    pieces = t5_tokenizer(scenes.VOCAB)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
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


def old_pipeline(vae: nn.Module) -> Any:
    """A StableDiffusionPipeline around `vae` whose UNet knows nothing yet; its scheduler ends at the data."""
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


@torch.no_grad()
def _spread(encoder: Any) -> Any:
    """Embeddings of size 1, which the start of CLIP's own training does not have, tell words and places apart."""
    for embedding in encoder.modules():  # of words, and of places
        if isinstance(embedding, nn.Embedding):
            embedding.weight.normal_()
    return encoder


# -- pictures and latents ---------------------------------------------------------------------------


def drawings(rng: np.random.Generator, rows: int) -> tuple[Tensor, list[str]]:
    """Drawings (rows, 3, H, W) in [-1, 1] of random training captions."""
    captions = scenes.draw_captions(rng, rows)
    return draw(captions, rng), captions


def draw(captions: list[str], rng: np.random.Generator) -> Tensor:
    """(N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([scenes.render(scenes.parse(text), rng) for text in captions])) * 2 - 1


def train_vae(steps: int, seed: int, shifted: bool = True) -> Any:
    """An AutoencoderKL that halves the sides once, its latents' scale, and shift if they have one, in its config."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=CHANNELS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=SIDE,
    ).to(device())
    optimizer, rng = torch.optim.AdamW(vae.parameters(), lr=3e-3), np.random.default_rng(seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    progress = report(steps)
    for step in range(1, steps + 1):
        x = drawings(rng, VAE_ROWS)[0].to(vae.device)
        with torch.autocast(vae.device.type, torch.bfloat16):
            law = vae.encode(x).latent_dist
            error = vae.decode(law.sample()).sample.float() - x
        loss = error.abs().mean() + error.square().mean() + KL * law.kl().sum() / law.mean.numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step, loss.item(), vae)
    with torch.no_grad():
        z = vae.encode(drawings(rng, 256)[0].to(vae.device)).latent_dist.mean
    size = z.std().item() if shifted else z.square().mean().sqrt().item()
    vae.register_to_config(scaling_factor=1 / size, shift_factor=z.mean().item() if shifted else None)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def reconstructed(vae: Any) -> float:
    """Share of held-out drawings that the verifier still reads after the VAE."""
    from rlflow.rewards.shapes import shapes_strict

    captions = scenes.heldout_captions()
    x = draw(captions, np.random.default_rng(1)).to(vae.device)
    images = vae.decode(vae.encode(x).latent_dist.mean).sample / 2 + 0.5
    return round(shapes_strict(images.clamp(0, 1).cpu(), captions).mean().item(), 3)


def latents(field: PretrainedField, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (latents (rows, C, h, w), prompt numbers (rows,))."""
    vae, rng = field.adapter.pipe.vae, np.random.default_rng(seed)
    while True:
        x, captions = drawings(rng, rows)
        with torch.no_grad(), torch.autocast(vae.device.type, torch.bfloat16):
            z = vae.encode(x.to(vae.device)).latent_dist.sample().float()
        yield (
            (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor,
            field.tokenize(captions).to(vae.device),
        )
