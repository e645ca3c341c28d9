"""Prompts in the six categories of GenEval (Ghosh et al., arXiv:2310.11513), with what must be seen in the picture.

    single_object "a photo of a dog"             two_object "a photo of a dog and a bus"
    counting      "a photo of three dogs"        colors     "a photo of a red bus"
    position      "a photo of a dog left of a bus"
    color_attr    "a photo of a red bus and a blue cat"

A row has the columns of GenEval's metadata: `tag` (the category), `include` (class, count, and perhaps color, or
position as [relation, index of the clause it refers to]) and `exclude`. The rows are drawn here from a fixed seed:
other prompts than the published 553, which `geneval:FILE.jsonl` reads, with English plurals ("knives", not "knifes").
A fifth of the meanings is held out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from typing import Any

_NAMES = (
    "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|parking meter|"
    "bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis|"
    "snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|"
    "fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|"
    "potted plant|bed|dining table|toilet|tv|laptop|computer mouse|tv remote|computer keyboard|cell phone|microwave|"
    "oven|toaster|sink|refrigerator|book|clock|vase|scissors|teddy bear|hair drier|toothbrush"
)
OBJECTS = tuple(_NAMES.split("|"))
"""COCO's 80 classes, as the prompts call them."""
COLORED = tuple(name for name in OBJECTS if name != "person")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {
    "person": "people",
    "sheep": "sheep",
    "broccoli": "broccoli",
    "knife": "knives",
    "computer mouse": "computer mice",
    "skis": "pairs of skis",
    "scissors": "pairs of scissors",
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PER_KIND = 600
"""Rows drawn of each category that has more; both sides of the split together."""
HELDOUT_SHARE = 0.2

Row = dict[str, Any]


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    return PLURALS.get(name) or (f"{name}es" if name.endswith(("s", "ch", "sh")) else f"{name}s")


def _row(tag: str, text: str, include: list[Row], exclude: Iterable[Row] = ()) -> Row:
    return {"prompt": f"a photo of {text}", "tag": tag, "include": include, "exclude": list(exclude)}


def _thing(name: str, count: int = 1, **more: Any) -> Row:
    return {"class": name, "count": count} | more


def _single(rng: random.Random) -> Row:
    name = rng.choice(OBJECTS)
    return _row("single_object", _a(name), [_thing(name)])


def _two(rng: random.Random) -> Row:
    a, b = rng.sample(OBJECTS, 2)
    return _row("two_object", f"{_a(a)} and {_a(b)}", [_thing(a), _thing(b)])


def _counting(rng: random.Random) -> Row:
    name, number = rng.choice(OBJECTS), rng.choice(list(NUMBERS))
    text = f"{NUMBERS[number]} {_plural(name)}"
    return _row("counting", text, [_thing(name, number)], [_thing(name, number + 1)])


def _colors(rng: random.Random) -> Row:
    name, color = rng.choice(COLORED), rng.choice(COLORS)
    return _row("colors", f"{_a(color)} {name}", [_thing(name, color=color)])


def _position(rng: random.Random) -> Row:
    (a, b), relation = rng.sample(OBJECTS, 2), rng.choice(list(OPPOSITE))
    return _row("position", f"{_a(a)} {relation} {_a(b)}", [_thing(b), _thing(a, position=[relation, 0])])


def _color_attr(rng: random.Random) -> Row:
    (a, b), (c, d) = rng.sample(COLORED, 2), rng.sample(COLORS, 2)
    return _row("color_attr", f"{_a(c)} {a} and {_a(d)} {b}", [_thing(a, color=c), _thing(b, color=d)])


KINDS: dict[str, Callable[[random.Random], Row]] = {
    "single_object": _single,
    "two_object": _two,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}


def meaning(row: Row) -> str:
    """The same text for every wording of the same picture: "a left of b" is "b right of a"."""
    include = row["include"]
    if row["tag"] == "position":
        (relation, _), b, a = include[1]["position"], include[0]["class"], include[1]["class"]
        first = a < b
        return f"position {min(a, b)} {relation if first else OPPOSITE[relation]} {max(a, b)}"
    return f"{row['tag']} {sorted((t['class'], t['count'], t.get('color', '')) for t in include)}"


def is_heldout(row: Row) -> bool:
    """Whether a row is kept out of training, a pure function of its meaning."""
    digest = hashlib.blake2b(f"geneval:{meaning(row)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < HELDOUT_SHARE * 2**64


def rows(kind: str, heldout: bool) -> list[Row]:
    """The rows of a category on one side of the split, in a fixed order."""
    rng = random.Random(kind)
    drawn: dict[str, Row] = {}
    for _ in range(4 * PER_KIND):  # enough to meet nearly every row of the small categories
        row = KINDS[kind](rng)
        drawn.setdefault(row["prompt"], row)
        if len(drawn) == PER_KIND:
            break
    return [row for row in drawn.values() if is_heldout(row) == heldout]
