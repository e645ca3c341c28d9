"""Latents as tokens: 2 x 2 of them side by side, channels outermost, as FLUX.1 and Qwen-Image read them."""

from __future__ import annotations

from torch import Tensor

from rlflow.models.pretrained.adapter import Adapter

SIDE = 2
"""Latents a side of a token."""


def pack(x: Tensor) -> Tensor:
    """(N, C, H, W) to tokens (N, H/2 W/2, 4 C)."""
    return x.unflatten(3, (-1, SIDE)).unflatten(2, (-1, SIDE)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `pack`, of tokens in so many rows and columns."""
    patches = tokens.unflatten(2, (-1, SIDE, SIDE)).unflatten(1, (rows, columns))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


JOINT = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
"""The attention's layers in blocks that read pictures and texts with weights of their own."""


class Packed(Adapter):
    """A pipeline that packs latents of fewer channels than its network reads."""

    modules = JOINT

    @property
    def patch(self) -> int:
        """Latents a side of a token."""
        return SIDE

    @property
    def channels(self) -> int:
        """Of a latent, before packing."""
        return int(self.network.config.in_channels // SIDE**2)
