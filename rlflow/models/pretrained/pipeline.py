"""Foreign checkpoints of images and videos as a VelocityField, from a folder or the hub: the pipelines of ADAPTERS.

    v(x, t) = -(noise - data predicted at sigma = 1 - t)

The base stays as it was downloaded; what trains is a LoRA (peft), or the whole network. Only what trains is part of
`state_dict`, so checkpoints of a LoRA run hold megabytes.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from rlflow import registry
from rlflow.flow.field import FEW_TOKENS, VelocityField
from rlflow.models import layers
from rlflow.models.io import HERE
from rlflow.models.pretrained import lora as lora_files
from rlflow.models.pretrained.adapter import Adapter
from rlflow.models.pretrained.foreign_lora import read_lora
from rlflow.models.pretrained.opening import open_pipeline, pipeline_class
from rlflow.models.prompt_table import Encoded, PromptTable
from rlflow.ranges import Count, Positive, Scale, Size, Text
from rlflow.types import Cond

ADAPTERS = {
    "StableDiffusion3Pipeline": "rlflow.models.pretrained.families.sd3:SD3",
    "FluxPipeline": "rlflow.models.pretrained.families.flux:flux",
    "Flux2Pipeline": "rlflow.models.pretrained.families.flux2:Dev",
    "Flux2KleinPipeline": "rlflow.models.pretrained.families.flux2:klein",
    "ZImagePipeline": "rlflow.models.pretrained.families.z_image:z_image",
    "QwenImagePipeline": "rlflow.models.pretrained.families.qwen_image:QwenImage",
    "WanPipeline": "rlflow.models.pretrained.families.wan:Wan",
    "StableDiffusionPipeline": "rlflow.models.pretrained.families.stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "rlflow.models.pretrained.families.stable_diffusion:StableDiffusionXL",
}
"""By the pipeline's class: what a new family adds besides its file."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDING = 1e-4
"""How far a scheduler that aims at `Adapter.near_data` may miss it: float32 puts a terminal sigma of .02 above it for
some numbers of steps and below it for others."""
FEW_STEPS = re.compile(r"(?<!de-)(?<![a-z])(turbo|schnell|lightning|hyper|distilled|dmd2?|lcm)(?![a-z])", re.IGNORECASE)
"""How the names of checkpoints say that they were distilled to a few steps, where their files do not."""
NEGATIVE = 0
"""Number of the negative prompt in the table."""


class PretrainedField(VelocityField):
    """The network of an adapter's pipeline; prompts are numbers of a table, so a condition is small."""

    builder = "rlflow.models.pretrained.pipeline:pretrained"
    own_format = True

    def __init__(
        self,
        adapter: Adapter,
        args: dict[str, Any],
        resolution: int,
        negative_prompt: str = "",
        max_sequence_length: int | None = None,
        release_encoders: bool = False,
        cache: int = 1024,
    ):
        super().__init__()
        self.adapter, self.args = adapter, args
        self.transformer: nn.Module = adapter.network  # a UNet too: parameters of checkpoints are named so
        layers.fuse(self.transformer)
        if adapter.component == "transformer":
            layers.fill_up(self.transformer)
            self.row_multiple = FEW_TOKENS
        self.max_sequence_length = max_sequence_length or adapter.max_sequence_length
        self.release_encoders = release_encoders
        self.num_features, self.ragged = adapter.pooled_width, adapter.ragged
        self.distilled = adapter.distilled or named_distilled(args.get("checkpoint", ""))
        self.first_time, self.frames = adapter.first_time, adapter.frames
        self.table = PromptTable(self._encode_texts, cache)
        self.table.numbers([negative_prompt])
        self.resize(resolution)
        if lora_files.parameters(self.transformer):
            self._keep_only_lora()

    def _keep_only_lora(self) -> None:
        """Leave the frozen base out of `state_dict`, and out of what loading one asks for."""

        def without_base(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
            for name in [n for n in state if n.startswith(prefix) and "lora_" not in n]:
                del state[name]

        def not_missing(module: nn.Module, keys: Any) -> None:
            ours = set(module.state_dict())
            frozen = [n for n, _ in module.named_parameters() if n not in ours]
            frozen += [n for n, _ in module.named_buffers()]
            keys.missing_keys[:] = [k for k in keys.missing_keys if not any(k.endswith(n) for n in frozen)]

        self.register_state_dict_post_hook(without_base)
        self.register_load_state_dict_post_hook(not_missing)

    # -- text ---------------------------------------------------------------------------------------

    def tokenize(self, captions: list[str]) -> Tensor:
        """Prompt numbers (N,) long; of any length, what a tokenizer cannot hold is cut as in the pipeline."""
        return self.table.numbers(captions)

    def settle(self) -> None:
        """All prompts of the run were tokenised: with `release_encoders`, encode them now and drop the encoders."""
        if self.release_encoders:
            self.table.close()
            for name in self.adapter.encoders:
                setattr(self.adapter.pipe, name, None)

    @torch.no_grad()
    def _encode_texts(self, texts: list[str]) -> Encoded:
        device = next(self.transformer.parameters()).device
        for name in self.adapter.encoders:
            if (encoder := getattr(self.adapter.pipe, name)) is not None:
                encoder.to(device)
        with torch.autocast(device.type, enabled=False):
            return self.adapter.encode(texts, self.max_sequence_length, device)

    def encode(self, obs: Tensor) -> Cond:
        """Prompt numbers (N,) to "prompt" (N,) and "pooled" (N, F)."""
        return Cond({"prompt": obs, "pooled": self.table(obs)["pooled"].float()})

    def null(self, cond: Cond) -> Cond:
        """The negative prompt, for as many rows as `cond` has."""
        return self.encode(torch.full_like(cond["prompt"], NEGATIVE))

    # -- the network --------------------------------------------------------------------------------

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the base, where its activations begin."""
        return self.adapter.network.dtype

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, *D) at x (N, *D), t (N,); dt is ignored."""
        dtype = self.weight_dtype
        text = {n: v.to(dtype) if v.is_floating_point() else v for n, v in self.table(cond["prompt"]).items()}
        return -self.adapter.predict(self.adapter.as_read(x), 1 - t, text)

    def without_idle(self) -> AbstractContextManager[None]:
        """The base alone while its LoRA is as it began."""
        return lora_files.without_idle(self.transformer)

    def lengths(self, v: Tensor) -> Tensor:
        """Where the pipeline's guidance keeps them."""
        found = self.adapter.lengths(v)
        return super().lengths(v) if found is None else found

    def decode(self, x: Tensor) -> Tensor:
        """Latents (N, *D) to images (N, 3, H, W), or videos (N, F, 3, H, W), in [0, 1]."""
        return self.adapter.decode(x)

    def times(self, num_steps: int) -> Tensor:
        """The pipeline's grid (K + 1,), of the resolution in place."""
        assert self.resolution is not None
        return 1 - self.adapter.sigmas(num_steps, self.resolution).double()

    def unscored(self, grid: Tensor) -> int:
        """2 where the last step begins almost at the data, as on SD3's twice shifted grid: the step before it leaves
        more noise than the last one can remove, and that one hardly moves."""
        return 2 if 1 - float(grid[-2]) <= self.adapter.near_data + ROUNDING else 0

    def resize(self, resolution: int) -> None:
        """Make square pictures of this many pixels a side; ValueError where the model cannot."""
        self.event_shape = self.adapter.latent_shape(resolution)
        self.resolution = resolution

    @property
    def grad_checkpointing(self) -> bool:
        """Recompute the blocks' activations in the backward pass."""
        return bool(self.adapter.network.is_gradient_checkpointing)

    @grad_checkpointing.setter
    def grad_checkpointing(self, on: bool) -> None:
        network = self.adapter.network
        network.enable_gradient_checkpointing() if on else network.disable_gradient_checkpointing()

    # -- files --------------------------------------------------------------------------------------

    def save_weights(self, folder: Path) -> None:
        """A LoRA folder, or a transformer folder, that plain diffusers reads; with a model card."""
        lora_files.save(self.adapter, folder, self.args)

    def load_weights(self, folder: Path) -> None:
        """Inverse of `save_weights`."""
        lora_files.load(self.adapter, folder)


def pretrained(
    checkpoint: str,
    resolution: Size | None = None,
    width: Size | None = None,
    frames: Size | None = None,
    lora: Size | None = None,
    lora_alpha: Positive | None = None,
    lora_modules: list[str] | None = None,
    adapter: str | None = None,
    weights: Literal["float32", "bfloat16"] = "float32",
    variant: str | None = None,
    quantize: Literal["int8", "nf4"] | None = None,
    negative_prompt: Text = "",
    embedded_guidance: Scale | None = None,
    max_sequence_length: Size | None = None,
    release_encoders: bool = False,
    cache: Count = 1024,
    vae_tiling: bool = False,
) -> PretrainedField:
    """A text-to-image or text-to-video pipeline of diffusers, from a folder or a hub id.

    `width`, `frames`: of a video, whose height is `resolution`; `eval.resolution` keeps its shape.
    `lora`: rank of a new LoRA (alpha: twice that unless given), else the whole network trains; `adapter`: an existing
    LoRA to start from. `weights`: of the base; a LoRA is float32 in any case. `variant`: of the files, such as fp16.
    `quantize`: the frozen base's linear layers (int8 by torchao, nf4 by bitsandbytes). `embedded_guidance`: FLUX dev's
    input. `release_encoders`: encode all prompts of the run once, then drop the encoders; otherwise the last `cache`
    prompts are kept encoded.
    """
    args = {k: v for k, v in locals().items() if v is not None}
    trains_lora = lora is not None or adapter is not None
    if not trains_lora and (weights != "float32" or quantize):
        raise ValueError(
            "the whole network trains in float32 only (a small step vanishes in anything less): set lora=32, or "
            "weights=float32 and no quantize"
        )
    if adapter is not None and lora is not None:
        raise ValueError("adapter brings its own rank: leave lora out with it")
    if adapter is not None and (lora_alpha is not None or lora_modules is not None):
        raise ValueError("adapter brings its own alpha and modules: leave lora_alpha and lora_modules out with it")
    if not trains_lora and (lora_alpha, lora_modules) != (None, None):
        raise ValueError("lora_alpha and lora_modules are of a LoRA, and the whole network trains: set lora too")
    border, begun_from = adapter_of(checkpoint)(open_pipeline(checkpoint, DTYPES[weights], quantize, variant)), ""
    border.check(checkpoint)
    if max_sequence_length is not None and not border.max_sequence_length:
        raise ValueError(f"{checkpoint} reads all of CLIP's tokens, always: leave max_sequence_length out")
    frame(border, checkpoint, resolution, width, frames)
    if embedded_guidance is not None:
        if border.embedded_guidance is None:
            raise ValueError(f"{checkpoint} has no guidance input: use policy.guidance instead")
        border.embedded_guidance = embedded_guidance
    if vae_tiling:
        border.pipe.vae.enable_tiling()
    if lora is not None:
        add_lora(border, lora, lora_alpha, lora_modules)
    if adapter is not None:
        with registry.located(f"adapter {adapter}"):
            found = read_lora(adapter, border)
            lora_files.attach(border.network, found.settings, found.tensors)
            begun_from = f"adapter {adapter}: scale {lora_files.scales(border.network)}, of {found.scale_from}"
        args["adapter"] = HERE  # a saved LoRA is a whole one, its shape included: it starts from itself
    if Path(checkpoint).is_dir():
        args["checkpoint"] = str(Path(checkpoint).resolve())
    field = PretrainedField(
        border,
        args,
        resolution or border.default_resolution,
        negative_prompt,
        max_sequence_length,
        release_encoders,
        cache,
    )
    field.begun_from = begun_from
    return field


def frame(border: Adapter, checkpoint: str, resolution: int | None, width: int | None, frames: int | None) -> None:
    """Give a video its number of frames and its sides; ValueError where it has none, or not these."""
    if border.frames is None and (width, frames) != (None, None):
        raise ValueError(f"{checkpoint} makes square pictures: leave width and frames out")
    border.frames = frames or border.frames
    if width is not None:
        height = resolution or border.default_resolution
        border.aspect = width / height
        if border.columns(height) != width:
            raise ValueError(f"width {width} must be a positive multiple of {border.cell * border.patch}")


def add_lora(border: Adapter, rank: int, alpha: float | None, modules: Sequence[str] | None) -> None:
    """A new one, on the attention's layers unless others are named."""
    network = border.network
    if modules is None:  # a family's last block may lack some of them
        ends = [end for end in border.modules if any(n.endswith(end) for n, _ in network.named_modules())]
    else:
        ends = list(modules)
    lora_files.attach(network, lora_files.new(network, rank, alpha, ends))


def named_distilled(checkpoint: str) -> str | None:
    """By the name of a hub id, of its folder in the hub's cache, or of any other folder."""
    parts = Path(checkpoint).parts
    names = [part for part in parts if part.startswith("models--")] + list(parts[-1:])
    return "a few steps" if any(FEW_STEPS.search(name) for name in names) else None


def adapter_of(checkpoint: str) -> Callable[[Any], Adapter]:
    """The adapter of a checkpoint's pipeline class; ValueError names those there are."""
    name = pipeline_class(checkpoint)
    if name not in ADAPTERS:
        raise ValueError(f"{checkpoint} is a {name}; there are adapters for {sorted(ADAPTERS)}")
    return family(name)


def family(name: str) -> Callable[[Any], Adapter]:
    """The adapter of a pipeline class in the table."""
    module, _, attribute = ADAPTERS[name].partition(":")
    found: Callable[[Any], Adapter] = getattr(importlib.import_module(module), attribute)
    return found
