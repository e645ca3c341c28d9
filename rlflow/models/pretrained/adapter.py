"""Adapter: the border to a text-to-image pipeline of diffusers. One small file per family derives from it.

Everything a pipeline does before and after its loop is asked of the pipeline itself (prompt encoding, sigmas); the loop
and the step are ours. Foreign convention: sigma = 1 - t, the network predicts noise - data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlflow.models.pretrained import scheduler
from rlflow.models.prompt_table import Encoding


class Adapter:
    """Base: latent shape and decoder, which families share. `pipe` is a loaded DiffusionPipeline."""

    encoders: ClassVar[Sequence[str]]
    """Names of the pipeline's text encoders."""
    max_sequence_length: ClassVar[int]
    """Of the T5 tokens, where the recipe names none; the pipeline's default."""
    num_steps: ClassVar[int]
    guidance: ClassVar[float]
    """The pipeline's defaults."""
    embedded_guidance: float | None = None
    """Scale the network takes as an input; None where it has none."""
    modules: ClassVar[Sequence[str]]
    """Linear layers that LoRA is added to, by the ends of their names: the attention's."""
    component: ClassVar[str] = "transformer"
    """What the pipeline calls its network."""
    near_data: ClassVar[float] = 0.02
    """Sigma from which a last step removes less noise than a step before it leaves."""

    def __init__(self, pipe: Any):
        self.pipe = pipe

    @property
    def network(self) -> Any:
        """What is trained."""
        return getattr(self.pipe, self.component)

    @property
    def channels(self) -> int:
        """Of a latent."""
        return int(self.network.config.in_channels)

    @property
    def patch(self) -> int:
        """Latents a side of a token."""
        return int(self.network.config.patch_size)

    @property
    def places(self) -> int | None:
        """Tokens a side that the network has positions for; None where any number will do."""
        return None

    @property
    def text_width(self) -> int:
        """Numbers of a text's token."""
        return int(self.network.config.joint_attention_dim)

    @property
    def pooled_width(self) -> int:
        """Numbers of "pooled"."""
        return int(self.network.config.pooled_projection_dim)

    @property
    def first_time(self) -> float:
        """1 - sigma where grids may start, if it is not at 0."""
        return 0.0

    def check(self, checkpoint: str) -> None:
        """ValueError for parts of the pipeline that it would not sample with as we do."""
        scheduler.check(self.pipe.scheduler, checkpoint)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """*D of a square picture; ValueError where the network cannot make one of this size."""
        if not isinstance(resolution, int) or isinstance(resolution, bool):
            raise ValueError(f"resolution {resolution!r}: pictures are square, give one whole number of pixels a side")
        multiple = self.pipe.vae_scale_factor * self.patch
        if resolution < multiple or resolution % multiple:
            raise ValueError(f"resolution {resolution} must be a positive multiple of {multiple}")
        if self.places is not None and resolution > multiple * self.places:
            largest = f"has positions for {self.places} patches of {multiple} pixels a side"
            raise ValueError(f"resolution {resolution}: the network {largest}: {multiple * self.places} at most")
        side = resolution // self.pipe.vae_scale_factor
        return self.channels, side, side

    @property
    def default_resolution(self) -> int:
        """The pipeline's own."""
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def encode(self, texts: list[str], max_sequence_length: int, device: torch.device) -> Encoding:
        """Named tensors (N, ...), "pooled" (N, F) among them."""
        raise NotImplementedError

    def sigmas(self, num_steps: int, resolution: int) -> Tensor:
        """(K + 1,) from 1 to 0, exactly as the pipeline sets them."""
        raise NotImplementedError

    def as_read(self, x: Tensor) -> Tensor:
        """x in the precision that `predict` takes it in."""
        return x.to(self.network.dtype)

    def predict(self, x: Tensor, sigma: Tensor, text: Encoding) -> Tensor:
        """noise - data (N, *D) at x (N, *D), sigma (N,)."""
        raise NotImplementedError

    def decode(self, x: Tensor) -> Tensor:
        """Latents (N, *D) to images (N, 3, H, W) in [0, 1], a row at a time: decoding needs much memory.

        For a gradient it is done again on the way back, so that only one row's activations are ever there.
        """
        vae = self.pipe.vae.to(x.device)
        z = x / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)

        def decode(row: Tensor) -> Tensor:
            return vae.decode(row, return_dict=False)[0]

        graph = torch.is_grad_enabled() and x.requires_grad
        rows = z.to(vae.dtype).split(1)
        images = [checkpoint(decode, row, use_reentrant=False) if graph else decode(row) for row in rows]
        return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)
