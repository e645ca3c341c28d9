"""GenEval: are the objects there, as many, so coloured, so placed? (Ghosh et al., arXiv:2310.11513)

    strict = 1 if every clause of `include` holds and no clause of `exclude` does, else 0

A clause asks for `count` objects of a class; the most certain ones found are looked at. Their colour is what CLIP says
of the crop, grey where the mask is not. "a left of b" holds for every pair of the two groups whose centres are apart by
more than a tenth of the sizes. Thresholds are GenEval's: .3, and .9 where objects are counted. Its detector, a
Mask2Former of mmdet, is one of transformers here (Swin-S, COCO instances); how far the scores agree is not measured.

`soft: true` pays shares of clauses instead, 1 exactly where strict is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rlflow.envs.captions.geneval import COLORS
from rlflow.ranges import Size, Unit
from rlflow.rewards.base import to_uint8
from rlflow.rewards.networks.detect import Found, Objects, keep, load_detector
from rlflow.rewards.networks.embed import Clip, load_clip
from rlflow.rewards.networks.hub import Precision, Source

log = logging.getLogger(__name__)

Clause = Mapping[str, Any]
ColorsOf = Callable[[str, Sequence[Found]], list[str]]
GREY = 153
APART = 0.1
"""Share of both sizes by which centres must differ to count as beside or above."""
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


def relations(a: Found, b: Found) -> set[str]:
    """How a stands to b: of left of, right of, above, below, none to two."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.box, b.box
    offset = np.array([(ax0 + ax1 - bx0 - bx1) / 2, (ay0 + ay1 - by0 - by1) / 2])
    sizes = np.array([ax1 - ax0 + bx1 - bx0, ay1 - ay0 + by1 - by0])
    beyond = np.maximum(np.abs(offset) - APART * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    told = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in told.items() if holds}


def shares(include: Sequence[Clause], exclude: Sequence[Clause], found: Objects, colors_of: ColorsOf) -> list[float]:
    """How far each clause holds, in [0, 1]; all are 1 exactly where the picture is right."""
    groups: list[list[Found] | None] = []
    out = []
    for clause in include:
        things = found.get(clause["class"], [])[: clause["count"]]
        parts = _parts(clause, things, groups, colors_of)
        groups.append(things if all(part == 1 for part in parts) else None)
        out.append(sum(parts) / len(parts))
    for clause in exclude:
        number, most = len(found.get(clause["class"], [])), clause["count"] - 1
        out.append(min(1.0, max(0.0, 1 - (number - most) / max(1, most))))
    return out


def _parts(
    clause: Clause, things: Sequence[Found], groups: Sequence[list[Found] | None], colors_of: ColorsOf
) -> list[float]:
    """Presence, colour and position of one clause, the last two where it names them; 0 for what was not reached."""
    parts = [len(things) / clause["count"]]
    if "color" in clause:
        right = colors_of(clause["class"], things).count(clause["color"]) if parts[0] == 1 else 0
        parts.append(right / clause["count"])
    if "position" in clause:
        relation, index = clause["position"]
        others = groups[index] if all(part == 1 for part in parts) else None
        pairs = [relation in relations(a, b) for a in things for b in others or []]
        parts.append(sum(pairs) / len(pairs) if pairs else 0.0)
    return parts


class ColorJudge:
    """CLIP's choice among ten colours for each object."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self.names = functools.cache(self._names)

    def _names(self, name: str) -> Tensor:
        """(10, F) one vector per colour, the mean over three ways to say it."""
        texts = [form.format(color=color, name=name) for color in COLORS for form in TEMPLATES]
        return F.normalize(self.clip.texts(texts).view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)

    def __call__(self, pixels: NDArray[np.uint8], name: str, things: Sequence[Found]) -> list[str]:
        """The colour of each of `things`, objects of the class `name` in the picture (H, W, 3)."""
        vectors = self.clip.pictures([crop(pixels, thing) for thing in things])
        return [COLORS[i] for i in (vectors @ self.names(name).T).argmax(1).tolist()]


def crop(pixels: NDArray[np.uint8], thing: Found) -> NDArray[np.uint8]:
    """The picture inside the box, at least a pixel of it, grey outside the mask."""
    if thing.mask is not None:
        pixels = np.where(thing.mask[..., None], pixels, np.uint8(GREY))
    height, width = pixels.shape[:2]
    x0, y0 = min(max(0, round(thing.box[0])), width - 1), min(max(0, round(thing.box[1])), height - 1)
    return np.ascontiguousarray(pixels[y0 : max(y0 + 1, round(thing.box[3])), x0 : max(x0 + 1, round(thing.box[2]))])


class GenEval:
    """1 where the picture shows what a GenEval prompt says, else 0: objects, counts, colours, positions."""

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        soft: bool = False,
        threshold: Unit | None = None,
        counting_threshold: Unit | None = None,
        max_overlap: Unit | None = None,
        side: Size = 800,
        device: str = "auto",
        offload: bool = False,
        precision: Precision = "float32",
    ):
        self.detector = load_detector(Source(detector, "detector"), device, offload, precision, side)
        source = Source(clip, "clip")
        self.colors = ColorJudge(load_clip(source, source, device, offload, precision))
        own = self.detector
        self.soft = soft
        self.threshold = own.threshold if threshold is None else threshold
        self.counting_threshold = own.counting_threshold if counting_threshold is None else counting_threshold
        self.max_overlap = own.max_overlap if max_overlap is None else max_overlap
        if min(self.threshold, self.counting_threshold) < own.threshold:
            raise ValueError(f"thresholds below {own.threshold} find nothing more with this detector")
        self._unknown: set[str] = set()

    def __call__(
        self,
        images: Tensor,
        tag: Sequence[str],
        include: Sequence[Sequence[Clause]],
        exclude: Sequence[Sequence[Clause]],
    ) -> Tensor:
        """(N,) 1 or 0, or with `soft` the mean share of the clauses; nan for classes the detector does not know."""
        rows = zip(to_uint8(images), tag, include, exclude, strict=True)
        return torch.tensor([self._one(*row) for row in rows])

    def _one(self, pixels: NDArray[np.uint8], tag: str, include: Sequence[Clause], exclude: Sequence[Clause]) -> float:
        names = sorted({clause["class"] for clause in (*include, *exclude)})
        if unknown := [name for name in names if not self.detector.knows(name)]:
            self._say(unknown[0])
            return float("nan")
        threshold = self.counting_threshold if tag == "counting" else self.threshold
        seen = {n: keep(f, threshold, self.max_overlap) for n, f in self.detector(pixels, names).items()}
        parts = shares(include, exclude, seen, lambda name, things: self.colors(pixels, name, things))
        return sum(parts) / len(parts) if self.soft else float(all(part == 1 for part in parts))

    def _say(self, name: str) -> None:
        if name not in self._unknown:
            self._unknown.add(name)
            log.warning("no geneval score for prompts with %r, which the detector does not know (said once)", name)
