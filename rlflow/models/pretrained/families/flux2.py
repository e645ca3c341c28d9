"""FLUX.2 klein and dev (Black Forest Labs 2025, 2026): what their diffusers pipelines do around the network.

Latents (N, 128, H/16, W/16): the noise is drawn after the VAE's latents were put together 2 x 2, and each is a token.
The shift of the grid depends on the number of tokens and of steps; the VAE's own scale is the running mean and variance
of a batch norm. Text is three layers of a language model side by side, padding included; it has no summary of its own.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rlflow.models.pretrained.adapter import Adapter, mean_token
from rlflow.models.pretrained.families.packing import JOINT, SIDE, unpack
from rlflow.models.prompt_table import Encoded, Encoding


class Klein(Adapter):
    """Flux2KleinPipeline: klein-base, 4B and 9B."""

    encoders = ("text_encoder",)
    max_sequence_length = 512
    num_steps, guidance = 50, 4.0
    modules = (
        *JOINT,
        *("attn.to_qkv_mlp_proj", "attn.to_out"),  # of the single blocks, whose MLP is in the same layers
    )

    @property
    def cell(self) -> int:
        """Pixels a side of a latent: of 2 x 2 of the VAE's."""
        return SIDE * int(self.pipe.vae_scale_factor)

    def encode(self, texts: list[str], max_sequence_length: int, device: torch.device) -> Encoded:
        """ "tokens" (N, L, 3 W), padding among them, and "pooled" (N, 3 W) of those before it."""
        tokens, _ = self.pipe.encode_prompt(list(texts), device=device, max_sequence_length=max_sequence_length)
        lengths = self.text_lengths(texts, max_sequence_length)
        return {"tokens": tokens, "pooled": mean_token([row[:n] for row, n in zip(tokens, lengths, strict=True)])}

    def text_lengths(self, texts: list[str], max_sequence_length: int) -> list[int]:
        """Tokens of each text that are no padding."""
        tokenizer, chats = self.pipe.tokenizer, [[{"role": "user", "content": text}] for text in texts]
        asked = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        chosen = tokenizer([tokenizer.apply_chat_template(chat, **asked) for chat in chats])["input_ids"]
        return [min(len(ids), max_sequence_length) for ids in chosen]

    def mu(self, num_steps: int, resolution: int) -> float:
        """Fitted to tokens and steps: more steps are shifted less."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return float(compute_empirical_mu(self.tokens(resolution), num_steps))

    def predict(self, x: Tensor, sigma: Tensor, text: Encoding) -> Tensor:
        """noise - data (N, *D)."""
        out = self.pipe.transformer(
            hidden_states=x.flatten(2).mT,
            timestep=sigma,
            guidance=self._guidance(x),
            encoder_hidden_states=text["tokens"],
            txt_ids=_places(1, 1, text["tokens"].shape[1]).to(x.device),
            img_ids=_places(x.shape[2], x.shape[3], 1).to(x.device),
            return_dict=False,
        )[0]
        return out.mT.unflatten(2, x.shape[2:])

    def _guidance(self, x: Tensor) -> Tensor | None:
        if self.embedded_guidance is None:
            return None
        return torch.full((len(x),), self.embedded_guidance, device=x.device, dtype=torch.float32)

    def for_vae(self, x: Tensor) -> Tensor:
        """Latents (N, *D) with the mean and spread that the VAE saw in training, and taken apart again."""
        vae, rows, columns = self.pipe.vae, x.shape[2], x.shape[3]
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        return unpack((x.flatten(2).mT * std + vae.bn.running_mean).to(x), rows, columns)


class Distilled(Klein):
    """Flux2KleinPipeline: klein, distilled to four steps without guidance."""

    num_steps, guidance = 4, 1.0
    distilled: ClassVar[str | None] = "a few steps"


class Dev(Klein):
    """Flux2Pipeline: dev, whose network takes the guidance scale; its text is of a Mistral with a system message."""

    guidance = 1.0
    embedded_guidance: float | None = 4.0
    distilled: ClassVar[str | None] = "guided velocities"

    def text_lengths(self, texts: list[str], max_sequence_length: int) -> list[int]:
        """Tokens of each text that are no padding."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        chats = format_input(prompts=list(texts), system_message=self.pipe.system_message)
        size = {"padding": "max_length", "truncation": True, "max_length": max_sequence_length}
        asked = {"add_generation_prompt": False, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        found: list[int] = (
            self.pipe.tokenizer.apply_chat_template(chats, **asked, **size)["attention_mask"].sum(1).tolist()
        )
        return found


def klein(pipe: Any) -> Klein:
    """The adapter of a Flux2KleinPipeline, by what its model_index.json says."""
    return (Distilled if pipe.config.is_distilled else Klein)(pipe)


def _places(rows: int, columns: int, words: int) -> Tensor:
    """(rows * columns * words, 4): 0, row, column and place in the text of each token."""
    return torch.cartesian_prod(*map(torch.arange, (1, rows, columns, words)))
