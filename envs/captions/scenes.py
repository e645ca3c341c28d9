"""The captioned-scene world: coloured shapes on black, captions that say exactly what is there.

Three kinds of caption, each of which an image satisfies or not (after GenEval, Ghosh et al. 2023):
    count     "one red circle", "three blue squares"          1 to 4 copies of one thing
    pair      "a red circle and a blue square"                two things of different colours
    relation  "a red circle left of a blue square"            two things and where they stand
A fifth of the *meanings* is held out: "a A left of a B" and "a B right of a A" fall on the same side, so
no held-out scene was ever seen under another wording.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.16, 0.16),
    "green": (0.16, 0.75, 0.24),
    "blue": (0.20, 0.31, 0.94),
    "yellow": (0.94, 0.86, 0.16),
    "purple": (0.67, 0.20, 0.78),
    "white": (0.96, 0.96, 0.96),
}
"""RGB in [0, 1]."""
SHAPES = ("circle", "square", "triangle")
NUMBERS = ("one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
KINDS = ("count", "pair", "relation")
PLURALS = tuple(shape + "s" for shape in SHAPES)
VOCAB = ["a", "and", *NUMBERS, *COLORS, *SHAPES, *PLURALS, "left", "right", "of", "above", "below"]
"""Every word of every caption; captions have at most 8 words."""
HELDOUT_SHARE = 0.2
MIN_RADIUS, MAX_RADIUS = 3.9, 5.3
"""In pixels at size 32: small enough for four apart, large enough to tell a circle from a square."""


@dataclass(frozen=True)
class Thing:
    """One coloured shape, named but not placed."""

    color: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What a caption says: `count` copies of one thing, or two things and perhaps their relation."""

    things: tuple[Thing, ...]
    count: int = 1
    relation: str | None = None

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return "count" if len(self.things) == 1 else "relation" if self.relation else "pair"

    @property
    def objects(self) -> tuple[Thing, ...]:
        """Every object to be seen, copies included."""
        return self.things * self.count

    @property
    def canonical(self) -> Scene:
        """The one scene that stands for every wording of the same meaning."""
        if self.kind == "count":
            return self
        first, second = self.things
        swap = self.relation in ("right of", "below") if self.relation else first.color > second.color
        if not swap:
            return self
        return Scene((second, first), relation=OPPOSITE[self.relation] if self.relation else None)


def caption(scene: Scene) -> str:
    """The caption of a scene; `parse` is its inverse."""
    if scene.kind == "count":
        (thing,) = scene.things
        return f"{NUMBERS[scene.count - 1]} {thing.color} {thing.shape}{'s' if scene.count > 1 else ''}"
    first, second = scene.things
    return f"a {first.color} {first.shape} {scene.relation or 'and'} a {second.color} {second.shape}"


def parse(text: str) -> Scene:
    """The scene of a caption (case and spacing are free); ValueError when it is not one of this world."""
    try:
        return _all()[" ".join(text.lower().split())]
    except KeyError:
        raise ValueError(
            f"not a caption of the scene world: {text!r}; write e.g. 'three red circles', "
            "'a red circle and a blue square' or 'a red circle left of a blue square' "
            f"(colours {', '.join(COLORS)}; shapes {', '.join(SHAPES)}; relations {', '.join(RELATIONS)})"
        ) from None


@functools.cache
def _all() -> dict[str, Scene]:
    things = [Thing(color, shape) for color in COLORS for shape in SHAPES]
    counts = [Scene((thing,), count=n) for n in range(1, 5) for thing in things]
    two = [pair for pair in itertools.permutations(things, 2) if pair[0].color != pair[1].color]
    scenes = counts + [Scene(pair, relation=r) for r in (None, *RELATIONS) for pair in two]
    return {caption(scene): scene for scene in scenes}


def all_scenes() -> list[Scene]:
    """Every scene, one per distinct caption, in a fixed order."""
    return list(_all().values())


@functools.cache
def is_heldout(scene: Scene) -> bool:
    """Whether the scene is kept out of training, a pure function of its meaning."""
    # the 42 was picked among a few hundred so that every colour, shape and number is held out somewhere
    digest = hashlib.blake2b(f"42:{caption(scene.canonical)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < HELDOUT_SHARE * 2**64


def split(heldout: bool, kinds: Sequence[str] = KINDS) -> list[str]:
    """Captions of `kinds` on one side of the split, in a fixed order."""
    return list(_split(heldout, tuple(kinds)))


@functools.cache
def _split(heldout: bool, kinds: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text for text, scene in _all().items() if scene.kind in kinds and is_heldout(scene) == heldout)


def train_captions(kinds: Sequence[str] = KINDS) -> list[str]:
    """Captions that pre-training and RL may see."""
    return split(False, kinds)


def heldout_captions(kinds: Sequence[str] = KINDS) -> list[str]:
    """Captions for evaluation only."""
    return split(True, kinds)


def draw_captions(
    rng: np.random.Generator, number: int, *, heldout: bool = False, mix: Sequence[float] = (0.25, 0.15, 0.6)
) -> list[str]:
    """`number` captions of one side: first the kind by the shares `mix` (as KINDS), then one of that kind."""
    pools = [split(heldout, (kind,)) for kind in KINDS]
    picks = rng.choice(len(KINDS), size=number, p=mix)
    return [pools[kind][int(rng.integers(len(pools[kind])))] for kind in picks]


def render(scene: Scene, rng: np.random.Generator, size: int = 32) -> NDArray[np.float32]:
    """One random drawing of the scene: (3, size, size) in [0, 1], anti-aliased, objects apart and whole."""
    scale = size / 32
    image = np.zeros((3, size, size), np.float32)
    axis = np.arange(size, dtype=np.float32) + 0.5
    for thing, (x, y, radius) in zip(scene.objects, _place(scene, rng), strict=True):
        cover = _coverage(thing.shape, axis - x * scale, (axis - y * scale)[:, None], radius * scale)
        image += cover * (np.array(COLORS[thing.color], np.float32)[:, None, None] - image)
    return image


def _coverage(shape: str, dx: NDArray, dy: NDArray, radius: float) -> NDArray[np.float32]:
    """Share of each pixel inside a shape, from the signed distance to its edge: (size, size) in [0, 1]."""
    if shape == "circle":
        distance = np.sqrt(dx * dx + dy * dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * radius
    else:  # apex at -radius, base at .9 radius, half width 1.05 radius
        side = (np.abs(dx) * 1.9 - (dy + radius) * 1.05) / np.float32(np.hypot(1.9, 1.05))
        distance = np.maximum(side, dy - 0.9 * radius)
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def _place(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and radius (x, y, r) of every object, in units of a 32-pixel canvas."""
    while True:
        spots = _scatter(len(scene.objects), rng)
        if spots is None:
            continue
        if scene.relation is None:
            return spots
        across, down = abs(spots[0][0] - spots[1][0]), abs(spots[0][1] - spots[1][1])
        if abs(across - down) >= 2:  # a diagonal is neither beside nor above
            return _orient(spots, scene.relation, across > down)


def _scatter(number: int, rng: np.random.Generator) -> list[tuple[float, float, float]] | None:
    """Up to 40 tries at `number` spots whose shapes cannot touch; None where it did not work out."""
    spots: list[tuple[float, float, float]] = []
    for u, v, w in rng.random((40, 3)).tolist():
        radius = MIN_RADIUS + (MAX_RADIUS - MIN_RADIUS) * w
        low, span = radius + 1, 30 - 2 * radius
        x, y = low + span * u, low + span * v
        # a square reaches .9 sqrt(2) of its radius towards a corner
        if all((x - a) ** 2 + (y - b) ** 2 > (1.28 * (radius + q) + 1) ** 2 for a, b, q in spots):
            spots.append((x, y, radius))
            if len(spots) == number:
                return spots
    return None


def _orient(spots: list[tuple[float, float, float]], relation: str, beside: bool) -> list[tuple[float, float, float]]:
    """Mirror two spots so that the first stands in `relation` to the second."""
    if beside != (relation in ("left of", "right of")):
        spots = [(y, x, r) for x, y, r in spots]
    axis = 0 if relation in ("left of", "right of") else 1
    first_is_less = spots[0][axis] < spots[1][axis]
    return spots if first_is_less == (relation in ("left of", "above")) else spots[::-1]
