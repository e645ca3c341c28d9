"""JPEG size as a reward, the toy task of DDPO (Black et al. 2023): smooth is small, textured is large."""

from __future__ import annotations

import io
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rlflow.ranges import Range
from rlflow.rewards.base import to_uint8

Quality = Annotated[int, Range("must be in [1, 100]", 1, 100)]


def jpeg_kilobytes(images: Tensor, quality: int = 95) -> Tensor:
    """(N,) size of each image as a JPEG file, in kB (1000 bytes); the header alone is .6."""
    return torch.tensor([_num_bytes(pixels, quality) / 1000 for pixels in to_uint8(images)])


def jpeg_compressibility(images: Tensor, quality: Quality = 95) -> Tensor:
    """(N,) minus the JPEG size in kB."""
    return -jpeg_kilobytes(images, quality)


def jpeg_incompressibility(images: Tensor, quality: Quality = 95) -> Tensor:
    """(N,) the JPEG size in kB."""
    return jpeg_kilobytes(images, quality)


def _num_bytes(pixels: NDArray[np.uint8], quality: int) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()
