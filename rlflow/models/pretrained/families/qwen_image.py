"""Qwen-Image (Wu et al. 2025) and -2512: what their diffusers pipeline does around the network, at our border.

Latents (N, 16, H/8, W/8), which the network reads 2 x 2 as tokens; guidance keeps the length of each token. Text is the
last layer of a vision-language model, as many tokens as it needs. The VAE is of videos, with a mean and a spread of
each channel. The grid ends at sigma .02, the scheduler's `shift_terminal`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rlflow.flow.guidance import CFG, CFGNorm
from rlflow.models.pretrained.adapter import mean_token
from rlflow.models.pretrained.families.packing import SIDE, Packed, pack, unpack
from rlflow.models.prompt_table import Encoded, Encoding


class QwenImage(Packed):
    """QwenImagePipeline."""

    encoders = ("text_encoder",)
    max_sequence_length = 512
    ragged = True
    num_steps, guidance = 50, 4.0
    guided: ClassVar[type[CFG]] = CFGNorm

    def encode(self, texts: list[str], max_sequence_length: int, device: torch.device) -> Encoded:
        """ "tokens" N times (L_i, W) and "pooled" (N, W).

        Each text on its own: the pipeline pads a batch to its longest, and an encoding would depend on its company.
        """
        ask = {"device": device, "max_sequence_length": max_sequence_length}
        once = {text: self.pipe.encode_prompt(text, **ask)[0][0] for text in dict.fromkeys(texts)}
        tokens = [once[text] for text in texts]
        return {"tokens": tokens, "pooled": mean_token(tokens)}

    def predict(self, x: Tensor, sigma: Tensor, text: Encoding) -> Tensor:
        """noise - data (N, *D)."""
        rows, columns = x.shape[2] // SIDE, x.shape[3] // SIDE
        out = self.pipe.transformer(
            hidden_states=pack(x),
            timestep=sigma,
            encoder_hidden_states=text["tokens"],
            encoder_hidden_states_mask=text.get("mask"),
            img_shapes=[[(1, rows, columns)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(out, rows, columns)

    def lengths(self, v: Tensor) -> Tensor:
        """Of each packed token, at every number of it."""
        tokens = pack(v)
        return unpack(tokens.norm(dim=-1, keepdim=True).expand_as(tokens), v.shape[2] // SIDE, v.shape[3] // SIDE)

    def for_vae(self, x: Tensor) -> Tensor:
        """Latents (N, *D) with the mean and spread of each of the VAE's channels."""
        config = self.pipe.vae.config
        mean, std = (
            x.new_tensor(list(numbers)).view(-1, 1, 1) for numbers in (config.latents_mean, config.latents_std)
        )
        return x * std + mean

    def picture(self, z: Tensor) -> Tensor:
        """Of its one frame: (N, 3, H, W) in [-1, 1]."""
        decoded: Tensor = self.pipe.vae.decode(z.unsqueeze(2), return_dict=False)[0]
        return decoded[:, :, 0]
