"""How near is the image to a given picture? The cosine of two CLIP image vectors, in [-1, 1].

The prompt file names the picture of each row in the column `reference`: a path, from where the command stands.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlflow.rewards.component import differentiable
from rlflow.rewards.networks.embed import load_clip
from rlflow.rewards.networks.hub import Precision, Source

log = logging.getLogger(__name__)


@differentiable
class ImageSimilarity:
    """Cosine of the image and the picture that the column `reference` names, of a CLIP model."""

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        device: str = "auto",
        offload: bool = False,
        precision: Precision = "float32",
    ):
        source = Source(model, "model")
        self.clip = load_clip(source, source, device, offload, precision)
        self._known: dict[str, Tensor | None] = {}

    def __call__(self, images: Tensor, reference: Sequence[str]) -> Tensor:
        """(N,) cosine; nan where the picture cannot be read, which is said once."""
        found = [self._reference(path) for path in reference]
        blank = torch.full((self.clip.network.network.config.projection_dim,), torch.nan)
        wanted = torch.stack([blank if vector is None else vector for vector in found])
        seen = self.clip.images(images)
        return (seen * wanted.to(seen.device)).sum(-1)

    def _reference(self, path: str) -> Tensor | None:
        if path not in self._known:
            self._known[path] = self._read(path)
        return self._known[path]

    def _read(self, path: str) -> Tensor | None:
        from PIL import Image

        try:
            with Image.open(Path(path)) as picture:
                pixels = np.array(picture.convert("RGB"))
        except (OSError, ValueError) as error:
            log.warning("no image_similarity for the rows with this picture (said once): %s", error)
            return None
        return self.clip.images(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0]
