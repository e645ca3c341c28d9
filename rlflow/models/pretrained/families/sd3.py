"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): what its diffusers pipeline does around the network, at our border.

Latents (N, 16, H/8, W/8); the network predicts noise - data at timestep 1000 sigma; text is two CLIPs beside a T5.
Without dynamic shift the pipeline's grid is shifted twice, so its last step is nearly empty and the one before it
ends almost at the data: neither is ever scored (`unscored`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlflow.models.pretrained.adapter import Adapter
from rlflow.models.pretrained.scheduler import grid, resolution_shift
from rlflow.models.prompt_table import Encoding


class SD3(Adapter):
    """StableDiffusion3Pipeline: SD3 and SD3.5, medium and large."""

    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    max_sequence_length = 256
    num_steps, guidance = 28, 7.0
    modules = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    def encode(self, texts: list[str], max_sequence_length: int, device: torch.device) -> Encoding:
        """ "tokens" (N, 77 + L, 4096) and "pooled" (N, 2048); padding is part of the text, as in the pipeline."""
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            texts,
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return {"tokens": tokens, "pooled": pooled}

    def sigmas(self, num_steps: int, resolution: int) -> Tensor:
        """(K + 1,) from 1 to 0."""
        scheduler = self.pipe.scheduler
        if not scheduler.config.use_dynamic_shifting:
            return grid(scheduler, num_steps)
        return grid(scheduler, num_steps, mu=resolution_shift(scheduler, self.tokens(resolution), max_shift=1.16))

    @property
    def places(self) -> int | None:
        """The learnt square of positions, which smaller pictures take the middle of."""
        return int(self.pipe.transformer.config.pos_embed_max_size)

    def tokens(self, resolution: int) -> int:
        """Patches of a square picture."""
        return (resolution // self.pipe.vae_scale_factor // self.patch) ** 2

    def predict(self, x: Tensor, sigma: Tensor, text: Encoding) -> Tensor:
        """noise - data (N, *D)."""
        return self.pipe.transformer(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=text["tokens"],
            pooled_projections=text["pooled"],
            return_dict=False,
        )[0]
