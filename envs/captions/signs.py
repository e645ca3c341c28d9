"""Prompts that ask for writing: 'A shop window with a sign that says "OPEN LATE"', with the column `text` for `ocr`.

Every text goes with a few of the places where writing stands. A fifth of the texts is held out: a held-out text was
never asked for in any place.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from typing import Any

_PLACES = (
    "A shop window with a sign that says|A chalkboard in a cafe on which is written|A road sign at dusk that reads|"
    "A neon sign in the rain that says|The cover of an old book titled|A birthday cake with icing that says|"
    "A wooden board on a beach that reads|A train platform with a display showing|A label on a glass bottle that says|"
    "A postcard with large letters that say|A mural on a brick wall that reads|A T-shirt printed with the words|"
    "A cardboard box stamped with|A lighthouse wall painted with the words|A ticket on a desk that reads|"
    "A robot holding a poster that says"
)
_FIRST = (
    "OPEN|FRESH|QUIET|SLOW|GRAND|NORTH|HAPPY|SECRET|GOLDEN|SILVER|LOST|FIRST|WARM|WILD|BRIGHT|HIDDEN|LITTLE|BRAVE|LUCKY|"
    "ANCIENT"
)
_SECOND = (
    "BREAD|HARBOR|GARDEN|MUSIC|STATION|COFFEE|RIVER|LIBRARY|MARKET|MOUNTAIN|WINDOW|PLANET|TICKETS|SUMMER|KITCHEN|ISLAND|"
    "THEATER|FOREST|LANTERN|WORKSHOP"
)
PLACES, FIRST, SECOND = (tuple(words.split("|")) for words in (_PLACES, _FIRST, _SECOND))
HELDOUT_SHARE = 0.2
PLACES_EACH = 3


def texts() -> list[str]:
    """Every text: single words, pairs of words, and pairs with a number."""
    pairs = [f"{a} {b}" for a, b in itertools.product(FIRST, SECOND)]
    numbered = [f"{pair} {7 * i % 90 + 10}" for i, pair in enumerate(pairs) if i % 3 == 0]
    return [*FIRST, *SECOND, *pairs, *numbered]


def is_heldout(text: str) -> bool:
    """Whether a text is kept out of training, a pure function of the text."""
    digest = hashlib.blake2b(f"sign:{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < HELDOUT_SHARE * 2**64


def rows(heldout: bool) -> list[dict[str, Any]]:
    """Prompts with their texts on one side of the split, in a fixed order."""
    found = []
    for text in texts():
        if is_heldout(text) == heldout:
            for place in random.Random(text).sample(PLACES, PLACES_EACH):
                found.append({"prompt": f'{place} "{text}"', "text": text})
    return found
