"""`rlflow pretrain sd3_scenes`, `klein_scenes`, `sd15_scenes`: small models that draw scenes, in diffusers' formats.

A VAE and the network of a pipeline of scene_pipelines.py are trained on drawings of envs/captions/scenes.py. For plain
diffusers each is a checkpoint like any other.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlflow.envs.captions import scenes
from rlflow.files import as_readable
from rlflow.flow.grid import uniform_times
from rlflow.flow.matching import cfm_loss
from rlflow.models.hub import quiet
from rlflow.models.pretrained.pipeline import PretrainedField, family
from rlflow.models.vp import noise_loss
from rlflow.parallel.dist import device
from rlflow.pretrain.images import judge_scenes
from rlflow.pretrain.matching import BEFORE_THE_MIDDLE, Times, pretrain, report
from rlflow.pretrain.scene_pipelines import FORMATS, LENGTH, SIDE, Format
from rlflow.ranges import Count, argument

ROWS, VAE_ROWS = 64, 32
KL = 1e-4
"""Weight of the VAE's KL, a mean over latent numbers, beside its errors per pixel."""


def uniform_after(first_time: float) -> Times:
    """Training times of what a model knows, all alike."""
    return lambda num, rng: first_time + (1 - first_time) * uniform_times(num, rng)


def is_hidden(name: str, parameter: Tensor) -> bool:
    """A matrix of a block, which Muon trains; embeddings of time, and what reads latents or texts, are none."""
    return "block" in name and "time_emb" not in name and parameter.ndim == 2


@dataclass(frozen=True)
class LatentScenes:
    """What `rlflow pretrain` asks of a world; `make` writes a folder of a pipeline of diffusers."""

    format: str
    """One of FORMATS."""
    steps: int

    @property
    def name(self) -> str:
        """What it is asked for by."""
        return f"{self.format}_scenes"

    @property
    def asset(self) -> str:
        """Its folder."""
        return self.name

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Steps of the VAE, and drawings a step of the network."""
        parser.add_argument("--vae-steps", type=argument(Count), default=300)
        parser.add_argument("--rows", type=argument(Count), default=ROWS)

    def make(self, out: Path, args: argparse.Namespace) -> dict[str, Any]:
        """Train the VAE, then the network; returns made_by.json's content."""
        torch.manual_seed(args.seed)
        begin, made_of = time.process_time(), FORMATS[self.format]
        vae = train_vae(made_of, args.vae_steps, args.seed)
        pipe = made_of.pipeline(vae)
        border = family(type(pipe).__name__)(pipe)
        length = LENGTH if border.max_sequence_length else None
        field = PretrainedField(border, {}, SIDE, max_sequence_length=length, cache=len(scenes.all_scenes()) + 1)
        field.to(device())
        averaged = pretrain(
            field,
            latents(field, made_of, args.rows, args.seed),
            steps=args.steps,
            hidden=[p for name, p in border.network.named_parameters() if is_hidden(name, p)],
            seed=args.seed,
            times=uniform_after(field.first_time) if field.first_time else BEFORE_THE_MIDDLE,
            loss=noise_loss if field.first_time else cfm_loss,
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


# -- pictures and latents ---------------------------------------------------------------------------


def drawings(rng: np.random.Generator, rows: int) -> tuple[Tensor, list[str]]:
    """Drawings (rows, 3, H, W) in [-1, 1] of random training captions."""
    captions = scenes.draw_captions(rng, rows)
    return draw(captions, rng), captions


def draw(captions: list[str], rng: np.random.Generator) -> Tensor:
    """(N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([scenes.render(scenes.parse(text), rng) for text in captions])) * 2 - 1


def train_vae(made_of: Format, steps: int, seed: int) -> Any:
    """The VAE of a format, which knows the scale of its latents."""
    vae = made_of.vae().to(device())
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
    made_of.settle(vae, z)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def reconstructed(vae: Any) -> float:
    """Share of held-out drawings that the verifier still reads after the VAE."""
    from rlflow.rewards.shapes import shapes_strict

    captions = scenes.heldout_captions()
    x = draw(captions, np.random.default_rng(1)).to(vae.device)
    images = vae.decode(vae.encode(x).latent_dist.mean).sample / 2 + 0.5
    return round(shapes_strict(images.clamp(0, 1).cpu(), captions).mean().item(), 3)


def latents(field: PretrainedField, made_of: Format, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (latents (rows, *D), prompt numbers (rows,))."""
    vae, rng = field.adapter.pipe.vae, np.random.default_rng(seed)
    while True:
        x, captions = drawings(rng, rows)
        with torch.no_grad(), torch.autocast(vae.device.type, torch.bfloat16):
            z = vae.encode(x.to(vae.device)).latent_dist.sample().float()
        yield made_of.scaled(vae, z), field.tokenize(captions).to(vae.device)
