"""Z-Image and Z-Image-Turbo (Tongyi-MAI 2025): what their diffusers pipeline does around the network, at our border.

Latents (N, 16, H/8, W/8). The network is told 1 - sigma and answers data - noise; it reads a list of texts, each with
the tokens it needs, so none is padded to another. The pipeline counts guidance from 0: its scale is our w - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlflow.models.pretrained.adapter import Adapter, mean_token
from rlflow.models.prompt_table import Encoded, Encoding

OF_TURBO = 3.0
"""Shift of Turbo's scheduler, and the only thing in its files that tells it from the base model, whose shift is 6."""


class ZImage(Adapter):
    """ZImagePipeline: the base model."""

    encoders = ("text_encoder",)
    max_sequence_length = 512
    ragged = True
    num_steps, guidance = 50, 6.0  # 1 + the pipeline's 5
    modules = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

    @property
    def patch(self) -> int:
        """Latents a side of a token."""
        return int(self.pipe.transformer.config.all_patch_size[0])

    @property
    def places(self) -> int | None:
        """The rows and columns that its rotary positions are tabled for."""
        return int(min(self.pipe.transformer.config.axes_lens[1:]))

    @property
    def text_width(self) -> int:
        """Numbers of a text's token."""
        return int(self.pipe.transformer.config.cap_feat_dim)

    @property
    def default_resolution(self) -> int:
        """The pipeline's own."""
        return 1024

    def encode(self, texts: list[str], max_sequence_length: int, device: torch.device) -> Encoded:
        """ "tokens" N times (L_i, W) and "pooled" (N, W)."""
        tokens, _ = self.pipe.encode_prompt(
            list(texts), device, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return {"tokens": tokens, "pooled": mean_token(tokens)}

    def unshifted(self, num_steps: int) -> Sequence[float]:
        """Even, with the pipeline's own rounding."""
        from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

        found: list[float] = get_default_z_image_sigmas(num_steps)
        return found

    def predict(self, x: Tensor, sigma: Tensor, text: Encoding) -> Tensor:
        """noise - data (N, *D)."""
        tokens: list[Tensor] = list(text["tokens"])
        if "mask" in text:
            tokens = [row[:n] for row, n in zip(tokens, text["mask"].sum(1).tolist(), strict=True)]
        pictures = list(x.unsqueeze(2))  # of one frame each
        time = (1000 - 1000 * sigma) / 1000  # as the pipeline rounds it: the network reads its thousandths
        out = self.pipe.transformer(pictures, time, tokens, return_dict=False)[0]
        return -torch.stack(out).squeeze(2)


class Turbo(ZImage):
    """ZImagePipeline: Turbo, distilled to nine steps without guidance."""

    num_steps, guidance = 9, 1.0
    distilled: ClassVar[str | None] = "a few steps"


def z_image(pipe: Any) -> ZImage:
    """The adapter of a ZImagePipeline, by its scheduler."""
    config = pipe.scheduler.config
    return (Turbo if not config.use_dynamic_shifting and config.shift == OF_TURBO else ZImage)(pipe)
