"""Stable Diffusion 1.x, 2.x (Rombach et al. 2022) and XL (Podell et al. 2023) as flow models (`rlflow.models.vp`).

Latents (N, 4, H/8, W/8); a UNet predicts the noise, or v, at an index of the scheduler's table. Grids are those of
DDIM with the scheduler's table and spacing, and an Euler step of ours is its step. They start where the spacing does,
at pure noise, and end at the data (`set_alpha_to_one`), where SD 1.5's own pipeline ends 3 % of noise short.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlflow.flow.path import at_least_float
from rlflow.models.pretrained.adapter import Adapter
from rlflow.models.prompt_table import Encoding
from rlflow.models.vp import Table

TABLE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
SPACING = ("timestep_spacing", "steps_offset")
"""Settings of a scheduler that are honoured, beside `prediction_type`; others are of a step of its own, or refused."""
REFUSED = (
    *("thresholding", "use_lu_lambdas", "use_flow_sigmas"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)
"""Settings that would clip the latents, or place the steps between the table's entries."""
DISTILLED = ("LCMScheduler", "TCDScheduler")


class StableDiffusion(Adapter):
    """StableDiffusionPipeline: 1.x and 2.x. Its text has no pooled vector: the mean of the tokens stands for it."""

    component = "unet"
    encoders: ClassVar[Sequence[str]] = ("text_encoder",)
    max_sequence_length = 0  # all of CLIP's tokens, always
    num_steps, guidance = 50, 7.5
    modules = ("to_q", "to_k", "to_v", "to_out.0")
    near_data = 0.04  # the table's first entries: a last step from there removes less noise than a step before it adds
    refused: ClassVar[Sequence[str]] = REFUSED
    """Settings that may not be on; this pipeline switches `clip_sample` off by itself."""
    added: ClassVar[str | None] = None
    """What the network is told beside the text, by its config."""

    @property
    def patch(self) -> int:
        """Latents a side of a token: there are none."""
        return 1

    @property
    def default_resolution(self) -> int:
        """That of the network."""
        return int(self.network.config.sample_size * self.pipe.vae_scale_factor)

    @property
    def text_width(self) -> int:
        """Numbers of a text's token."""
        return int(self.network.config.cross_attention_dim)

    @property
    def pooled_width(self) -> int:
        """Numbers of "pooled"."""
        return self.text_width

    # -- the table ----------------------------------------------------------------------------------

    def check(self, checkpoint: str) -> None:
        """ValueError for a network or a scheduler that is not as the pipeline's first release has them."""
        config, where = self.network.config, f"{checkpoint}/unet/config.json"
        if config.time_cond_proj_dim is not None:
            raise ValueError(f"{where}: the network is distilled (time_cond_proj_dim), and takes few steps of its own")
        if config.in_channels != config.out_channels or config.addition_embed_type != self.added:
            raise ValueError(f"{where}: in_channels and addition_embed_type are not those of a text-to-image network")
        settings, name = self.pipe.scheduler.config, type(self.pipe.scheduler).__name__
        where = f"{checkpoint}/scheduler/scheduler_config.json"
        if name in DISTILLED or "beta_start" not in settings:
            raise ValueError(f"{where}: {name} has no steps that ours are: save the pipeline with DDIMScheduler")
        read = inspect.signature(type(self.pipe.scheduler).__init__).parameters  # a file may hold others' settings too
        if wrong := [setting for setting in self.refused if setting in read and settings.get(setting)]:
            raise ValueError(f"{where}: {wrong[0]} is on, and our steps know nothing of it: set it to false")
        try:
            self.table  # noqa: B018 - made at once, and kept
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{where}: {error}") from error

    @cached_property
    def ddim(self) -> Any:
        """DDIM of the scheduler's table and spacing."""
        from diffusers import DDIMScheduler

        config = self.pipe.scheduler.config
        return DDIMScheduler(**{name: config[name] for name in (*TABLE, *SPACING) if name in config})

    @cached_property
    def table(self) -> Table:
        """Alphas, and what the network predicts."""
        return Table(self.ddim.alphas_cumprod, self.pipe.scheduler.config.prediction_type)

    @property
    def first_time(self) -> float:
        """Where the table ends."""
        return self.table.first_time

    def sigmas(self, num_steps: int, resolution: int) -> Tensor:
        """(K + 1,) float64 down to 0, from where the spacing starts."""
        if num_steps > len(self.table.times) - self.ddim.config.steps_offset:
            raise ValueError(f"{num_steps} steps are more than the {len(self.table.times)} of the scheduler's table")
        self.ddim.set_timesteps(num_steps)
        return torch.cat([1 - self.table.times[self.ddim.timesteps], torch.zeros(1, dtype=torch.float64)])

    # -- text and network ---------------------------------------------------------------------------

    def encode(self, texts: list[str], max_sequence_length: int, device: torch.device) -> Encoding:
        """ "tokens" (N, 77, 768), with padding, as in the pipeline, and "pooled" (N, 768), their mean without."""
        tokens, _ = self.pipe.encode_prompt(texts, device, 1, do_classifier_free_guidance=False)
        length = self.pipe.tokenizer.model_max_length
        found = self.pipe.tokenizer(texts, padding="max_length", max_length=length, truncation=True)
        mask = torch.tensor(found.attention_mask, device=device).unsqueeze(-1)
        return {"tokens": tokens, "pooled": (tokens * mask).sum(1) / mask.sum(1)}

    def as_read(self, x: Tensor) -> Tensor:
        """In float32 at least: where a step begins in noise, what is rounded away is multiplied by 1 / alpha."""
        return at_least_float(x)

    def predict(self, x: Tensor, sigma: Tensor, text: Encoding) -> Tensor:
        """noise - data (N, *D)."""

        def network(z: Tensor, index: Tensor) -> Tensor:
            z = z.to(self.network.dtype)
            added = {"added_cond_kwargs": self.told(z, text)}
            found: Tensor = self.network(z, index, text["tokens"], **added, return_dict=False)[0]
            return found

        return -self.table.velocity(x, 1 - sigma, network)

    def told(self, z: Tensor, text: Encoding) -> dict[str, Tensor] | None:
        """What the network reads beside the text."""
        return None


class StableDiffusionXL(StableDiffusion):
    """StableDiffusionXLPipeline: two CLIPs, the second's pooled vector, and the picture's size as six numbers.

    An empty text is zeros where the pipeline says so (`force_zeros_for_empty_prompt`): what guidance subtracts.
    """

    encoders = ("text_encoder", "text_encoder_2")
    num_steps, guidance = 50, 5.0
    refused = ("clip_sample", *REFUSED)
    added = "text_time"

    @property
    def pooled_width(self) -> int:
        """Of the second CLIP's projection."""
        config = self.network.config
        return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)

    def encode(self, texts: list[str], max_sequence_length: int, device: torch.device) -> Encoding:
        """ "tokens" (N, 77, 2048) and "pooled" (N, 1280)."""
        tokens, _, pooled, _ = self.pipe.encode_prompt(texts, device=device, do_classifier_free_guidance=False)
        zeros = self.pipe.config.force_zeros_for_empty_prompt
        kept = torch.tensor([bool(text) or not zeros for text in texts], device=device)
        return {"tokens": tokens * kept.view(-1, 1, 1), "pooled": pooled * kept.view(-1, 1)}

    def told(self, z: Tensor, text: Encoding) -> dict[str, Tensor]:
        """The pooled text; the size as it was, where it was cut, and the size now: a whole picture of this size."""
        height, width = (side * self.pipe.vae_scale_factor for side in z.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=z.device, dtype=torch.float32)
        return {"text_embeds": text["pooled"], "time_ids": sizes.expand(len(z), -1)}
