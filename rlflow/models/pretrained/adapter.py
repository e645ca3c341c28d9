"""Adapter: the border to a text-to-image, or -video, pipeline of diffusers. One small file per family derives from it.

Everything a pipeline does before and after its loop is asked of the pipeline itself (prompt encoding, sigmas); the loop
and the step are ours. Foreign convention: sigma = 1 - t, the network predicts noise - data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlflow.flow.guidance import CFG
from rlflow.flow.solvers import Euler, Solver
from rlflow.models.pretrained import scheduler
from rlflow.models.prompt_table import Encoded, Encoding


class Adapter:
    """Base: what most families share. `pipe` is a loaded DiffusionPipeline."""

    encoders: ClassVar[Sequence[str]]
    """Names of the pipeline's text encoders."""
    max_sequence_length: ClassVar[int]
    """Of the text's tokens, where the recipe names none; the pipeline's default."""
    ragged: ClassVar[bool] = False
    """True where a text has as many tokens as it needs, and the longest of a batch decides how many are padded."""
    num_steps: ClassVar[int]
    guidance: ClassVar[float]
    """The pipeline's defaults; its scale as w of v_u + w (v_c - v_u), in which 1 is none, whatever it counts from."""
    guided: ClassVar[type[CFG]] = CFG
    """What the pipeline makes of its two answers."""
    embedded_guidance: float | None = None
    """Scale the network takes as an input; None where it has none."""
    distilled: ClassVar[str | None] = None
    """To what, where the network does not predict the mean velocity of the data any more."""
    modules: ClassVar[Sequence[str]]
    """Linear layers that LoRA is added to, by the ends of their names: the attention's."""
    component: ClassVar[str] = "transformer"
    """What the pipeline calls its network."""
    frames: int | None = None
    """Of a video; None where pictures are made."""
    aspect: float | None = None
    """Width over height; None where all is square."""
    near_data: ClassVar[float] = 0.02
    """Sigma from which a last step removes less noise than a step before it leaves."""

    def __init__(self, pipe: Any):
        self.pipe = pipe

    # -- shapes -------------------------------------------------------------------------------------

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
    def cell(self) -> int:
        """Pixels a side of a latent."""
        return int(self.pipe.vae_scale_factor)

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
        """Numbers of "pooled": of the mean of a text's tokens, where the model has nothing of the kind."""
        return self.text_width

    @property
    def first_time(self) -> float:
        """1 - sigma where grids may start, if it is not at 0."""
        return 0.0

    @property
    def solver(self) -> Solver:
        """The step of the pipeline's sampler."""
        return Euler()

    def check(self, checkpoint: str) -> None:
        """ValueError for parts of the pipeline that it would not sample with as we do."""
        scheduler.check(self.pipe.scheduler, checkpoint)

    def columns(self, resolution: int) -> int:
        """Pixels from left to right of what has so many from top to bottom, in whole tokens."""
        multiple = self.cell * self.patch
        return resolution if self.aspect is None else max(1, round(resolution * self.aspect / multiple)) * multiple

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """*D of a picture of this height; ValueError where the network cannot make one of this size."""
        if not isinstance(resolution, int) or isinstance(resolution, bool):
            raise ValueError(f"resolution {resolution!r}: pictures are square, give one whole number of pixels a side")
        multiple = self.cell * self.patch
        if resolution < multiple or resolution % multiple:
            raise ValueError(f"resolution {resolution} must be a positive multiple of {multiple}")
        if self.places is not None and resolution > multiple * self.places:
            largest = f"has positions for {self.places} patches of {multiple} pixels a side"
            raise ValueError(f"resolution {resolution}: the network {largest}: {multiple * self.places} at most")
        return self.channels, resolution // self.cell, self.columns(resolution) // self.cell

    def tokens(self, resolution: int) -> int:
        """Patches of a picture."""
        side = self.cell * self.patch
        return (resolution // side) * (self.columns(resolution) // side)

    @property
    def default_resolution(self) -> int:
        """The pipeline's own."""
        return int(self.pipe.default_sample_size * self.pipe.vae_scale_factor)

    # -- before the loop ----------------------------------------------------------------------------

    def encode(self, texts: list[str], max_sequence_length: int, device: torch.device) -> Encoded:
        """Named tensors (N, ...): "pooled" (N, F), "tokens" (N, L, W), or N of them (L_i, W) where they are ragged."""
        raise NotImplementedError

    def unshifted(self, num_steps: int) -> Sequence[float]:
        """Sigmas that the pipeline gives to its scheduler; a family that has a fixed list gives that."""
        return np.linspace(1.0, 1 / num_steps, num_steps).tolist()

    def mu(self, num_steps: int, resolution: int) -> float:
        """Of a dynamic shift: linear in the picture's tokens."""
        return scheduler.resolution_shift(self.pipe.scheduler, self.tokens(resolution), max_shift=1.15)

    def sigmas(self, num_steps: int, resolution: int) -> Tensor:
        """(K + 1,) from 1 to 0, exactly as the pipeline sets them; ValueError where it makes another number."""
        given = self.unshifted(num_steps)
        if len(given) != num_steps:
            raise ValueError(f"this model's pipeline samples in {len(given)} steps of its own, and not in {num_steps}")
        return scheduler.grid(self.pipe.scheduler, sigmas=np.asarray(given), mu=self.mu(num_steps, resolution))

    # -- in the loop --------------------------------------------------------------------------------

    def as_read(self, x: Tensor) -> Tensor:
        """x in the precision that `predict` takes it in."""
        return x.to(self.network.dtype)

    def predict(self, x: Tensor, sigma: Tensor, text: Encoding) -> Tensor:
        """noise - data (N, *D) at x (N, *D), sigma (N,); text has "mask" (N, L) where texts of it are padded."""
        raise NotImplementedError

    def lengths(self, v: Tensor) -> Tensor | None:
        """Of a velocity (N, *D), where guidance keeps them, as what divides it; None: that of a whole sample."""
        return None

    # -- after the loop -----------------------------------------------------------------------------

    def for_vae(self, x: Tensor) -> Tensor:
        """Latents (N, *D) in the VAE's own scale."""
        config = self.pipe.vae.config
        return x / config.scaling_factor + (config.shift_factor or 0.0)

    def picture(self, z: Tensor) -> Tensor:
        """What the VAE makes of latents (N, ...) in its scale: (N, 3, H, W), or (N, F, 3, H, W), in [-1, 1]."""
        decoded: Tensor = self.pipe.vae.decode(z, return_dict=False)[0]
        return decoded

    def decode(self, x: Tensor) -> Tensor:
        """Latents (N, *D) to images (N, 3, H, W), or videos (N, F, 3, H, W), in [0, 1], a row at a time for the memory.

        For a gradient it is done again on the way back, so that only one row's activations are ever there.
        """
        vae = self.pipe.vae.to(x.device)
        graph = torch.is_grad_enabled() and x.requires_grad
        rows = self.for_vae(x).to(vae.dtype).split(1)
        images = [checkpoint(self.picture, z, use_reentrant=False) if graph else self.picture(z) for z in rows]
        return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)


def mean_token(tokens: Sequence[Tensor]) -> Tensor:
    """(N, W) float32: features of texts whose model has none, from their tokens (L_i, W) without padding."""
    return torch.stack([row.float().mean(0) for row in tokens])
