"""CLIP's two encoders behind one object: unit vectors of images and of texts (Radford et al., arXiv:2103.00020).

    e(image) = W_i f(image) / |W_i f(image)|        e(text) likewise        cosine = e(image) . e(text)

Images are judged as the 8-bit pictures that would be saved: resized with Pillow's bicubic, centre-cropped and
normalised as the checkpoint's own preprocessor says. Rewards that name the same checkpoint share one network and one
pass over the images of a batch. Where a gradient is asked for, the same is done in tensors, without the rounding.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rlflow.rewards.component import wants_graph
from rlflow.rewards.memory import BatchMemory
from rlflow.rewards.networks.hub import OnDevice, Precision, Source, need_transformers

log = logging.getLogger(__name__)

ROWS = 32
"""Images or texts in one pass."""


@dataclass(frozen=True)
class Pixels:
    """How a checkpoint wants its images: side in pixels, mean and std by channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Pixels:
        """From a preprocessor_config.json, in which sizes are numbers or tables."""
        crop = values.get("crop_size", values.get("size"))
        if isinstance(crop, Mapping):
            crop = crop.get("height", crop.get("shortest_edge"))
        if not isinstance(crop, int):
            raise ValueError(f"the preprocessor names no size of images: {dict(values)}")
        return cls(crop, tuple(values["image_mean"]), tuple(values["image_std"]))

    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(N, H, W, 3) uint8 to (N, 3, size, size) float32, normalised; what is not square is centre-cropped."""
        # on 8 bits it rounds as Pillow does
        return self._normalised(self._cropped(torch.from_numpy(pixels).permute(0, 3, 1, 2)).float() / 255)

    def graded(self, images: Tensor) -> Tensor:
        """The same of images (N, 3, H, W) in [0, 1], with their graph: not rounded, bicubic's overshoot cut off."""
        return self._normalised(self._cropped(images.float()).clamp(0, 1))

    def _cropped(self, images: Tensor) -> Tensor:
        """The centre (N, 3, size, size) of images whose shorter side was brought to `size`."""
        height, width = images.shape[-2:]
        scale = self.size / min(height, width)
        shape = (max(self.size, int(height * scale)), max(self.size, int(width * scale)))
        if shape != (height, width):
            images = F.interpolate(images, shape, mode="bicubic", antialias=True)
        top, left = ((side - self.size) // 2 for side in shape)
        return images[..., top : top + self.size, left : left + self.size]

    def _normalised(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std


def vector(output: Any) -> Tensor:
    """The projected vector (N, F): transformers 4 returns it, transformers 5 an object that holds it."""
    return output if isinstance(output, Tensor) else output.pooler_output


class Clip:
    """A CLIP model with its tokenizer and its preprocessor."""

    def __init__(self, network: OnDevice[Any], tokenizer: Any, pixels: Pixels):
        self.network, self.tokenizer, self.pixels = network, tokenizer, pixels
        self.max_tokens = int(network.network.config.text_config.max_position_embeddings)
        self.memory = BatchMemory(self._images)

    @property
    def scale(self) -> float:
        """The learned temperature, exp(logit_scale)."""
        return float(self.network.network.logit_scale.float().exp())

    def images(self, images: Tensor) -> Tensor:
        """(N, F) unit vectors of images (N, 3, H, W) in [0, 1], float32 on the host; on their device with a graph."""
        if not wants_graph(images):
            return self.memory(images)
        values = self.pixels.graded(images).to(self.network.device, self.network.dtype)
        with self.network.use(graph=True) as network:
            found = vector(network.get_image_features(pixel_values=values)).float()
        return F.normalize(found, dim=-1).to(images.device)

    def _images(self, pixels: NDArray[np.uint8]) -> Tensor:
        return self._vectors([self.pixels(pixels[i : i + ROWS]) for i in range(0, len(pixels), ROWS)])

    def pictures(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(N, F) unit vectors of pictures (H, W, 3) uint8 of any sizes, float32 on the host."""
        small = [self.pixels(pixels[None]) for pixels in pictures]
        return self._vectors([torch.cat(small[i : i + ROWS]) for i in range(0, len(small), ROWS)])

    def _vectors(self, batches: Sequence[Tensor]) -> Tensor:
        parts = []
        with self.network.use() as network:
            for values in batches:
                values = values.to(self.network.device, self.network.dtype)
                parts.append(vector(network.get_image_features(pixel_values=values)).float().cpu())
        return F.normalize(torch.cat(parts), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, F) unit vectors, float32 on the host; equal texts are encoded once, long ones are cut off."""
        known = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        parts = []
        with self.network.use() as network:
            for start in range(0, len(known), ROWS):
                tokens = self.tokenize(list(known)[start : start + ROWS])
                parts.append(vector(network.get_text_features(**tokens)).float().cpu())
        return F.normalize(torch.cat(parts), dim=-1)[[known[text] for text in texts]]

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Token numbers and their mask, padded to the model's length, on its device."""
        found = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return {name: found[name].to(self.network.device) for name in ("input_ids", "attention_mask")}

    def cosine(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """(N,) cosine of each image and its text."""
        seen = self.images(images)
        return (seen * self.texts(texts).to(seen.device)).sum(-1)


def read_processor(source: Source, config: Any) -> tuple[Any, Pixels]:
    """Tokenizer and preprocessor, for a network of `config`."""
    pixels = Pixels.read(source.preprocessor())
    return source.tokenizer(int(config.text_config.vocab_size)), pixels


@functools.cache
def load_clip(model: Source, processor: Source, device: str, offload: bool, precision: Precision) -> Clip:
    """The CLIP model with its tokenizer and preprocessor; the same one for every reward that asks alike."""
    network = model.network(need_transformers().CLIPModel)
    return Clip(OnDevice(network, device, offload, precision), *read_processor(processor, network.config))
