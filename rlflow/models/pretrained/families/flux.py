"""FLUX.1 dev and schnell (Black Forest Labs 2024): what its diffusers pipeline does around the network, at our border.

Latents (N, 16, H/8, W/8) here; the network reads 2 x 2 patches of them as tokens, predicts noise - data, and where it
was distilled for it (dev) takes the guidance scale as an input, so that guidance costs no second pass.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rlflow.models.pretrained.families.packing import Packed, pack, unpack
from rlflow.models.prompt_table import Encoding


class Flux(Packed):
    """FluxPipeline: dev, whose network takes the guidance scale."""

    encoders = ("text_encoder", "text_encoder_2")
    max_sequence_length = 512
    num_steps, guidance = 28, 1.0
    embedded_guidance: float | None = 3.5
    distilled: ClassVar[str | None] = "guided velocities"

    @property
    def pooled_width(self) -> int:
        """Of CLIP's summary of a text."""
        return int(self.pipe.transformer.config.pooled_projection_dim)

    def encode(self, texts: list[str], max_sequence_length: int, device: torch.device) -> Encoding:
        """ "tokens" (N, L, 4096) and "pooled" (N, 768); padding is part of the text, as in the pipeline."""
        tokens, pooled, _ = self.pipe.encode_prompt(texts, None, device=device, max_sequence_length=max_sequence_length)
        return {"tokens": tokens, "pooled": pooled}

    def predict(self, x: Tensor, sigma: Tensor, text: Encoding) -> Tensor:
        """noise - data (N, *D)."""
        n, _, height, width = x.shape
        rows, columns = height // self.patch, width // self.patch
        out = self.pipe.transformer(
            hidden_states=pack(x),
            timestep=sigma,
            guidance=self._guidance(n, x),
            pooled_projections=text["pooled"],
            encoder_hidden_states=text["tokens"],
            txt_ids=text["tokens"].new_zeros(text["tokens"].shape[1], 3),
            img_ids=_places(rows, columns).to(x),
            return_dict=False,
        )[0]
        return unpack(out, rows, columns)

    def _guidance(self, num: int, x: Tensor) -> Tensor | None:
        if self.embedded_guidance is None:
            return None
        return torch.full((num,), self.embedded_guidance, device=x.device, dtype=torch.float32)


class Schnell(Flux):
    """FluxPipeline: schnell, distilled to few steps of an unshifted grid, without guidance, on shorter texts."""

    max_sequence_length = 256
    num_steps = 4
    embedded_guidance = None
    distilled = "a few steps"


def flux(pipe: Any) -> Flux:
    """The adapter of a FluxPipeline, by whether its network has a guidance input."""
    return (Flux if pipe.transformer.config.guidance_embeds else Schnell)(pipe)


def _places(rows: int, columns: int) -> Tensor:
    """(rows * columns, 3): 0, row, column of each token."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1).float()
