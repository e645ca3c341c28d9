"""Which objects are where in a picture? Detectors of transformers behind one call.

Mask2Former (Cheng et al., arXiv:2112.01527), on COCO's classes: each query q has class probabilities and a mask;
    score(q, c) = p_q(c) * mean of sigmoid(mask) where it is above 1/2
OWLv2 (Minderer et al., arXiv:2306.09683), on any class by name: boxes, of which the overlapping ones are dropped here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rlflow.registry import SettingError
from rlflow.rewards.networks.hub import OnDevice, Precision, Source, need_transformers

ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "tvmonitor": "tv",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "hair dryer": "hair drier",
}
"""A checkpoint's name of a class -> the prompts' (GenEval's)."""
LONGEST = 1333
MULTIPLE = 32


@dataclass(frozen=True)
class Found:
    """One object: box (x0, y0, x1, y1) in pixels, confidence in [0, 1], mask (H, W) bool if there is one."""

    box: tuple[float, float, float, float]
    score: float
    mask: NDArray[np.bool_] | None = None


Objects = dict[str, list[Found]]
"""What was found in a picture by class, the most certain first."""


class Detector(Protocol):
    """What finds objects; its thresholds are those of an object in general and where objects are counted."""

    threshold: float
    counting_threshold: float
    max_overlap: float

    def knows(self, name: str) -> bool:
        """Whether it can find objects of a class."""
        ...

    def __call__(self, pixels: NDArray[np.uint8], names: Sequence[str]) -> Objects:
        """Objects of the classes `names` in a picture (H, W, 3), at least all above `threshold`."""
        ...


def overlap(a: Found, b: Found) -> float:
    """Intersection over union of two boxes."""
    width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = sum((f.box[2] - f.box[0]) * (f.box[3] - f.box[1]) for f in (a, b))
    return shared / (areas - shared) if areas > shared else 0.0


def keep(found: Sequence[Found], threshold: float, max_overlap: float, limit: int = 16) -> list[Found]:
    """Objects above the threshold, at most `limit`, the most certain first; less those that overlap a better one."""
    kept: list[Found] = []
    for thing in sorted((f for f in found if f.score > threshold), key=lambda f: -f.score)[:limit]:
        if max_overlap >= 1 or all(overlap(thing, other) < max_overlap for other in kept):
            kept.append(thing)
    return kept


def mask_box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """The box around a mask that is not empty."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(cols[0]), float(rows[0]), float(cols[-1] + 1), float(rows[-1] + 1)


class Mask2Former:
    """Instances of COCO's classes with their masks."""

    threshold, counting_threshold, max_overlap = 0.3, 0.9, 1.0  # GenEval's

    def __init__(self, network: OnDevice[Any], labels: Mapping[int, str], pixels: Mapping[str, Any], side: int):
        self.network, self.side = network, side
        self.names = [ALIASES.get(labels[i], labels[i]) for i in range(len(labels))]
        self.mean, self.std = (torch.tensor(pixels[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))

    def knows(self, name: str) -> bool:
        """Whether the checkpoint was trained on the class."""
        return name in self.names

    def __call__(self, pixels: NDArray[np.uint8], names: Sequence[str]) -> Objects:
        """Objects of `names` in (H, W, 3); shorter side scaled to `side`, the longer to 1333 at most."""
        image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        height, width = image.shape[-2:]
        scale = min(self.side / min(height, width), LONGEST / max(height, width))
        inner = (max(1, round(height * scale)), max(1, round(width * scale)))
        image = F.interpolate(image[None], inner, mode="bilinear", antialias=True)
        image = (image - self.mean) / self.std
        padding = (-inner[1] % MULTIPLE, -inner[0] % MULTIPLE)
        values = F.pad(image, (0, padding[0], 0, padding[1])).to(self.network.device, self.network.dtype)
        mask = F.pad(torch.ones(1, *inner, dtype=torch.long), (0, padding[0], 0, padding[1])).to(values.device)
        with self.network.use() as network:
            out = network(pixel_values=values, pixel_mask=mask)
            outer = values.shape[-2:]
            return self._read(out.class_queries_logits[0], out.masks_queries_logits[0], outer, inner, names, pixels)

    def _read(
        self,
        classes: Tensor,
        masks: Tensor,
        outer: Sequence[int],
        inner: Sequence[int],
        names: Sequence[str],
        pixels: NDArray[np.uint8],
    ) -> Objects:
        """Objects from logits: classes (Q, C + 1), the last "nothing"; masks (Q, h, w) over the padded picture."""
        chances = classes.float().softmax(-1)[:, :-1]
        out: Objects = {name: [] for name in names}
        wanted = [i for i, name in enumerate(self.names) if name in out]
        for query in (chances[:, wanted] > self.threshold).any(1).nonzero().flatten().tolist() if wanted else []:
            logits = F.interpolate(masks[None, query, None].float(), outer, mode="bilinear", align_corners=False)
            logits = logits[..., : inner[0], : inner[1]]
            logits = F.interpolate(logits, pixels.shape[:2], mode="bilinear", align_corners=False)[0, 0]
            inside = logits > 0
            if not bool(inside.any()):
                continue
            sure = float(logits.sigmoid()[inside].mean())
            mask = inside.cpu().numpy()
            for i in wanted:
                if (chance := float(chances[query, i])) > self.threshold:
                    out[self.names[i]].append(Found(mask_box(mask), chance * sure, mask))
        return {name: sorted(found, key=lambda f: -f.score) for name, found in out.items()}


class Owl:
    """Objects of any class by its name, as boxes (OWLv2); thresholds of ours, not GenEval's."""

    threshold, counting_threshold, max_overlap = 0.2, 0.2, 0.5

    def __init__(self, network: OnDevice[Any], tokenizer: Any, pixels: Mapping[str, Any]):
        self.network, self.tokenizer = network, tokenizer
        self.size = int(network.network.config.vision_config.image_size)
        self.length = int(network.network.config.text_config.max_position_embeddings)
        self.mean, self.std = (torch.tensor(pixels[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))

    def knows(self, name: str) -> bool:
        """It looks for whatever is named."""
        return bool(name)

    def __call__(self, pixels: NDArray[np.uint8], names: Sequence[str]) -> Objects:
        """Objects of `names` in (H, W, 3), padded to a square with grey."""
        image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        height, width = image.shape[-2:]
        side = max(height, width)
        image = F.pad(image, (0, side - width, 0, side - height), value=0.5)
        image = F.interpolate(image[None], (self.size, self.size), mode="bilinear", antialias=True)
        values = ((image - self.mean) / self.std).to(self.network.device, self.network.dtype)
        texts = [f"a photo of a {name}" for name in names]
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        with self.network.use() as network:
            given = {k: tokens[k].to(values.device) for k in ("input_ids", "attention_mask")}
            out = network(pixel_values=values, **given)
        return self._read(out.logits[0].float().sigmoid().cpu(), out.pred_boxes[0].float().cpu() * side, names)

    def _read(self, chances: Tensor, boxes: Tensor, names: Sequence[str]) -> Objects:
        """Objects from chances (P, names) and boxes (P, 4), centre and size in pixels; a box has its likeliest name."""
        centre, half = boxes[:, :2], boxes[:, 2:] / 2
        corners = torch.cat([centre - half, centre + half], 1).tolist()
        out: Objects = {name: [] for name in names}
        best = chances.max(1)
        for i in (best.values > self.threshold).nonzero().flatten().tolist():
            a, b, c, d = corners[i]
            out[names[int(best.indices[i])]].append(Found((a, b, c, d), float(best.values[i])))
        return {name: sorted(found, key=lambda f: -f.score) for name, found in out.items()}


def load_detector(source: Source, device: str, offload: bool, precision: Precision, side: int) -> Detector:
    """The detector of a folder or a name on the hub; ValueError for a kind that is not known here."""
    transformers = need_transformers()
    config = source.load(transformers.AutoConfig.from_pretrained, "config.json of a network", trust_remote_code=False)
    if config.model_type == "mask2former":
        network = source.network(transformers.Mask2FormerForUniversalSegmentation)
        placed = OnDevice(network, device, offload, precision)
        return Mask2Former(placed, config.id2label, source.preprocessor(), side)
    if config.model_type == "owlv2":
        network = source.network(transformers.Owlv2ForObjectDetection)
        tokenizer = source.tokenizer(int(config.text_config.vocab_size))
        return Owl(OnDevice(network, device, offload, precision), tokenizer, source.preprocessor())
    what = f"{source.name!r} is a {config.model_type}"
    raise SettingError(source.setting, f"{what}: give a mask2former of COCO instances, or an owlv2")
