"""Wan 2.1 text-to-video (Wan Team 2025): what its diffusers pipeline does around the network, at our border.

Latents (N, 16, 1 + (F - 1) / 4, H/8, W/8) of F frames; the network is told 1000 sigma and predicts noise - data. Text
is a UMT5's with zeros where it is padded, which the network attends to. The VAE decodes causally, a latent frame after
the other, with a mean and a spread of each channel. It ships with UniPC on a shifted grid, which tells the network
whole thousandths and starts at sigma 1 - 1e-6 (ours at 1); FlowMatchEulerDiscreteScheduler tells 1000 sigma as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlflow.flow.solvers import Euler, Solver, UniPC
from rlflow.models.pretrained import scheduler
from rlflow.models.pretrained.adapter import Adapter
from rlflow.models.prompt_table import Encoding

UNIPC = "UniPCMultistepScheduler"
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "predict_x0": True, "final_sigmas_type": "zero"}
STEP = {"solver_order": 2, "solver_type": "bh2", "lower_order_final": True, "disable_corrector": [], "solver_p": None}
OFF = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "thresholding", "use_dynamic_shifting")
"""Settings of UniPC that are wanted, of its step (our solver `unipc`), and those that would move the grid off the
flow's or clip the latents."""


class Wan(Adapter):
    """WanPipeline: 2.1, and 2.2 where it has one network."""

    encoders = ("text_encoder",)
    max_sequence_length = 512
    num_steps, guidance = 50, 5.0
    frames: int = 81
    modules = tuple(f"{part}.{layer}" for part in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0"))

    @property
    def unipc(self) -> bool:
        """Whether the scheduler is the one that it ships with."""
        return type(self.pipe.scheduler).__name__ == UNIPC

    @property
    def patch(self) -> int:
        """Latents a side of a token; in time each is one."""
        return int(self.network.config.patch_size[1])

    @property
    def cell(self) -> int:
        """Pixels a side of a latent."""
        return int(self.pipe.vae_scale_factor_spatial)

    @property
    def text_width(self) -> int:
        """Numbers of a text's token."""
        return int(self.network.config.text_dim)

    @property
    def default_resolution(self) -> int:
        """Of the 1.3B's training, from top to bottom."""
        return 480

    @property
    def solver(self) -> Solver:
        """The pipeline's own."""
        return UniPC() if self.unipc else Euler()

    def check(self, checkpoint: str) -> None:
        """ValueError for two networks, for a timestep of each token, and for a scheduler of other steps."""
        config, where = self.pipe.config, f"{checkpoint}/model_index.json"
        if config.boundary_ratio is not None or config.expand_timesteps or self.pipe.transformer is None:
            raise ValueError(f"{where}: this Wan has two networks, or a timestep for each token: Wan 2.1 has neither")
        if not self.unipc:
            scheduler.check(self.pipe.scheduler, checkpoint)
            return
        found, where = self.pipe.scheduler.config, f"{checkpoint}/scheduler/scheduler_config.json"
        for name, value in {**FLOW, **STEP, **dict.fromkeys(OFF, False)}.items():
            if found[name] != value:
                raise ValueError(f"{where}: {name} is {found[name]!r}, and {UNIPC} of a flow has {value!r}: set it so")

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """*D of a video whose sides are as they were asked for, `resolution` from top to bottom."""
        every = int(self.pipe.vae_scale_factor_temporal)
        if self.frames % every != 1:
            raise ValueError(f"frames={self.frames}: the VAE makes 1 + {every} k of them, such as {every + 1} or 81")
        channels, rows, columns = super().latent_shape(resolution)
        return channels, 1 + self.frames // every, rows, columns

    def encode(self, texts: list[str], max_sequence_length: int, device: torch.device) -> Encoding:
        """ "tokens" (N, L, 4096), zeros where a text is padded, and "pooled" (N, 4096), their mean without."""
        ask: dict[str, Any] = {"do_classifier_free_guidance": False, "max_sequence_length": max_sequence_length}
        tokens, _ = self.pipe.encode_prompt(list(texts), device=device, **ask)
        lengths = tokens.ne(0).any(-1).sum(1, keepdim=True).clamp(min=1)
        return {"tokens": tokens, "pooled": tokens.float().sum(1) / lengths}

    def sigmas(self, num_steps: int, resolution: int) -> Tensor:
        """(K + 1,) from 1 to 0."""
        found = scheduler.grid(self.pipe.scheduler, num_steps).clone()
        found[0] = 1.0
        return found

    def told(self, sigma: Tensor) -> Tensor:
        """What the network hears of the time (N,), as the scheduler says it."""
        if not self.unipc:
            return 1000 * sigma
        return (1000 * sigma).floor().clamp(max=999)

    def predict(self, x: Tensor, sigma: Tensor, text: Encoding) -> Tensor:
        """noise - data (N, *D)."""
        told = {"timestep": self.told(sigma), "encoder_hidden_states": text["tokens"]}
        out: Tensor = self.network(hidden_states=x, **told, return_dict=False)[0]
        return out

    def for_vae(self, x: Tensor) -> Tensor:
        """Latents (N, *D) with the mean and spread of each of the VAE's channels."""
        config = self.pipe.vae.config
        mean, std = (x.new_tensor(list(v)).view(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return x * std + mean

    def picture(self, z: Tensor) -> Tensor:
        """Its frames: (N, F, 3, H, W) in [-1, 1]."""
        decoded: Tensor = self.pipe.vae.decode(z, return_dict=False)[0]
        return decoded.transpose(1, 2)
