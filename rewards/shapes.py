"""Verifier of the captioned-scene world: finds the objects, checks the caption (after GenEval, 2310.11513).

An object is a 4-connected bright region; all regions of a batch are measured together, by sums over pixels.
With a = brightness / brightness of the region's inside (the share of a pixel the object covers), r and c the
sums of a over rows and columns, A its total:
    extent  A / (max r * max c)      square 1, circle pi/4, triangle about .6, diamond .56
    lean    third central moment of r over sigma^3      triangle on its base -.57, the others 0
    spread  (variance in x + in y) / A      circle .160, square .168, triangle .195, ring .23, 2:1 bar .21
Thresholds lie between the .2 % quantiles of true shapes under noise .05 and blur .6 px. What fits none has no
shape; a region of mixed colours has no colour.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from rlflow.envs.captions.scenes import COLORS, SHAPES, Scene, Thing, parse
from rlflow.rewards.memory import BatchMemory

log = logging.getLogger(__name__)
Array = NDArray[Any]

PARTS = ("count", "color", "shape", "relation")
BRIGHT = 0.35  # of full scale, in the brightest channel
MIN_AREA = 8  # pixels at size 32: a third of the smallest triangle; smaller specks are no objects
MAX_FILL = 0.25  # of the image: a larger region has no shape, or a white canvas would be "one white square"
MIN_SHARE = 0.6  # of a region's pixels that must agree on the colour
NONE = -1  # colour or shape id of a region that has none

_NAMES = tuple(COLORS)
_HUES = np.array([np.array(rgb) / max(rgb) for rgb in COLORS.values()], np.float32)
_PLANE = np.zeros((3, 3, 3), bool)
_PLANE[1] = ndimage.generate_binary_structure(2, 1)  # neighbours inside one image, never across the batch


@dataclass(frozen=True)
class Found:
    """One object of an image: ids into COLORS and SHAPES (or NONE) and its centre in pixels."""

    color: int
    shape: int
    x: float
    y: float
    area: float


def detect(pixels: NDArray[np.uint8]) -> list[list[Found]]:
    """Objects of every image, largest first; pixels (N, H, W, 3)."""
    bright = np.maximum(np.maximum(pixels[..., 0], pixels[..., 1]), pixels[..., 2])
    inside = bright > 255 * BRIGHT
    labels, number = ndimage.label(inside, _PLANE)
    found: list[list[Found]] = [[] for _ in pixels]
    if number == 0:
        return found
    at = np.nonzero(labels)
    region = labels[at] - 1
    image = np.zeros(number, np.int64)
    image[region] = at[0]
    cover = _coverage(bright[at], _eroded(inside)[at], region, number)
    color = _color_ids(pixels[at], region, number)
    rows, cols = (_profile(cover, region, at[axis], number, pixels.shape[axis]) for axis in (1, 2))
    canvas = pixels.shape[1] * pixels.shape[2]
    shape, area = _shape_ids(rows, cols, MAX_FILL * canvas), rows.sum(1)
    x, y = _middle(cols), _middle(rows)
    least = MIN_AREA * canvas / 32**2
    order = np.argsort(-area, kind="stable")
    for k in order[area[order] >= least]:
        thing = Found(int(color[k]), int(shape[k]), float(x[k]), float(y[k]), float(area[k]))
        found[image[k]].append(thing)
    return found


def _eroded(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels whose four neighbours are inside too."""
    p = np.pad(inside, ((0, 0), (1, 1), (1, 1)))
    return inside & p[:, :-2, 1:-1] & p[:, 2:, 1:-1] & p[:, 1:-1, :-2] & p[:, 1:-1, 2:]


def _coverage(bright: Array, inner: Array, region: Array, number: int) -> Array:
    """Brightness over its mean in the region's inner pixels (in all, where it has none), at most 1."""
    bright = bright.astype(np.float64)
    weight = inner + 1e-6  # the epsilon decides only where a region has no inner pixel
    peak = np.bincount(region, weight * bright, number) / np.bincount(region, weight, number)
    return np.minimum(bright / peak[region], 1)


def _color_ids(rgb: NDArray[np.uint8], region: Array, number: int) -> NDArray[np.int64]:
    """The colour most pixels of a region are nearest to at any brightness; NONE without a clear majority."""
    hue = rgb / rgb.max(-1, keepdims=True).astype(np.float32)
    nearest = (hue @ _HUES.T - 0.5 * (_HUES**2).sum(1)).argmax(-1)  # least distance, without |hue|^2
    votes = np.bincount(region * len(_HUES) + nearest, minlength=number * len(_HUES)).reshape(number, -1)
    return np.where(votes.max(1) >= MIN_SHARE * votes.sum(1), votes.argmax(1), NONE)


def _profile(cover: Array, region: Array, position: Array, number: int, length: int) -> Array:
    """(M, length) coverage of every region summed over the other axis."""
    return np.bincount(region * length + position, cover, number * length).reshape(number, -1)


def _shape_ids(rows: Array, cols: Array, most: float) -> NDArray[np.int64]:
    """(M,) shape ids from both profiles; see the head of the file. `most`: the largest area that has a shape."""
    area, height, width = rows.sum(1), cols.max(1), rows.max(1)
    var_y, third = _moments(rows, area)
    var_x, _ = _moments(cols, area)
    extent, spread = area / (height * width), (var_x + var_y) / area
    lean = third / np.maximum(var_y, 1e-9) ** 1.5
    even = (np.abs(np.log(height / width)) < 0.3) & (area < most)
    level = np.abs(lean) < 0.2
    shape = np.full(len(area), NONE)
    shape[even & level & (extent >= 0.7) & (spread < 0.185)] = SHAPES.index("circle")
    shape[even & level & (extent >= 0.885) & (spread < 0.19)] = SHAPES.index("square")
    shape[even & (lean <= -0.3) & (extent < 0.78) & (spread < 0.22)] = SHAPES.index("triangle")
    return shape


def _moments(profile: Array, area: Array) -> tuple[Array, Array]:
    """Second and third central moments (M,) of the profiles (M, L), whose sums are `area`."""
    axis = np.arange(profile.shape[1])
    centred = axis - (profile @ axis / area)[:, None]
    return (profile * centred**2).sum(1) / area, (profile * centred**3).sum(1) / area


def _middle(profile: Array) -> Array:
    """(M,) centre of every region's extent along one axis, in pixels (a triangle's centroid lies lower)."""
    inked = profile > 0
    return (inked.argmax(1) + profile.shape[1] - inked[:, ::-1].argmax(1)) / 2


def judge(found: list[Found], scene: Scene) -> tuple[float, float, float, float]:
    """The share of each of PARTS that is right, in [0, 1]; 1 is all right, nan does not apply."""
    count = 1 - min(1, abs(len(found) - len(scene.objects)) / len(scene.objects))
    if scene.kind == "count":
        (thing,) = scene.things
        return count, _share(found, thing, "color"), _share(found, thing, "shape"), np.nan
    seen = [_largest(found, thing.color) for thing in scene.things]
    color = sum(f is not None for f in seen) / 2
    shape = sum(f is not None and _is(f.shape, t.shape) for f, t in zip(seen, scene.things, strict=True)) / 2
    return count, color, shape, _relation(seen[0], seen[1], scene.relation)


def _largest(found: list[Found], color: str) -> Found | None:
    return next((f for f in found if f.color == _NAMES.index(color)), None)


def _is(shape: int, name: str) -> bool:
    return shape != NONE and SHAPES[shape] == name


def _share(found: list[Found], thing: Thing, part: str) -> float:
    """Share of the objects that have the thing's colour or shape; 0 when there are none."""
    if part == "color":
        right = sum(f.color == _NAMES.index(thing.color) for f in found)
    else:
        right = sum(_is(f.shape, thing.shape) for f in found)
    return right / max(1, len(found))


def _relation(first: Found | None, second: Found | None, relation: str | None) -> float:
    """1 if the first object stands so to the second (the longer offset decides the axis), nan without one."""
    if relation is None:
        return np.nan
    if first is None or second is None:
        return 0.0
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > abs(dy):
        return float(relation == ("left of" if dx > 0 else "right of"))
    return float(relation == ("above" if dy > 0 else "below"))


memory = BatchMemory(detect)
_complained: set[str] = set()


def _scene(caption: str) -> Scene | None:
    """The scene of a caption, None (said once) when it is not of this world."""
    try:
        return parse(caption)
    except ValueError as error:
        if caption not in _complained and len(_complained) < 5:
            _complained.add(caption)
            log.warning("no shapes score for this prompt (said once): %s", error)
        return None


def _shares(images: Tensor, prompt: Sequence[str]) -> Tensor:
    """(N, 4) shares of PARTS; a row of nan where the prompt is no scene."""
    nothing = (np.nan,) * len(PARTS)
    scenes = [_scene(caption) for caption in prompt]
    rows = [judge(f, s) if s else nothing for f, s in zip(memory(images), scenes, strict=True)]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, len(PARTS))


def shapes_soft(images: Tensor, prompt: Sequence[str]) -> Tensor:
    """(N,) in [0, 1]: mean of the parts of the caption (count, colour, shape, relation) that are right."""
    return _shares(images, prompt).nanmean(1)


def shapes_strict(images: Tensor, prompt: Sequence[str]) -> Tensor:
    """(N,) 1 where everything the caption says is right and nothing else is there, else 0."""
    shares = _shares(images, prompt)
    right = (shares.isnan() | (shares == 1)).all(1).float()
    return torch.where(shares.isnan().all(1), torch.nan, right)


def shapes_parts(images: Tensor, prompt: Sequence[str]) -> dict[str, Tensor]:
    """PARTS -> (N,) 1 where that part is right, 0 where not, nan where it does not apply; for reports."""
    shares = _shares(images, prompt)
    right = torch.where(shares.isnan(), torch.nan, (shares == 1).float())
    return dict(zip(PARTS, right.unbind(1), strict=True))
