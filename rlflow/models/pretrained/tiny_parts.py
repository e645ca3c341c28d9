"""What tiny random pipelines of several families have in common: the VAE, the scheduler, weights off their start."""

from __future__ import annotations

from typing import Any

import torch

SIZES = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 32}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
"""Of a VAE that halves the picture's sides twice."""


def plain_vae(channels: int) -> Any:
    """Of Stable Diffusion 3, FLUX.1 and Z-Image."""
    from diffusers import AutoencoderKL

    moments = {"latent_channels": channels, "scaling_factor": 1.5, "shift_factor": 0.06}
    plain = {"use_quant_conv": False, "use_post_quant_conv": False}
    return AutoencoderKL(**SIZES, **BLOCKS, **moments, **plain).eval()


def euler(**config: Any) -> Any:
    """The scheduler of all of them."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def moved(module: torch.nn.Module, by: float = 0.1) -> Any:
    """With every parameter off its start: layers that begin at zero would hide what they are given."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return module.eval()
