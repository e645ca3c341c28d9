"""The world of short words: three random capital letters, drawn in a light colour on black.

The caption is 'the word "ABC"'; tokenizers spell the quoted part. A fifth of all 17,576 strings is held out
of training. The font is the one built into Pillow, so drawings need no file from outside.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import string

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

LETTERS = string.ascii_uppercase
LENGTH = 3
VOCAB = ["the", "word", *LETTERS]
"""Every token of every caption; a caption has 5."""
HELDOUT_SHARE = 0.2
CELL_WIDTH, CAP_HEIGHT = 9, 13
"""Widest glyph and height of the capitals, in pixels; letters start CELL_WIDTH + 1 apart."""


def caption(text: str) -> str:
    """The caption that asks for `text`."""
    return f'the word "{text}"'


def parse(prompt: str) -> str:
    """The text a caption asks for; ValueError when it is not one of this world."""
    found = re.fullmatch(rf'the word "([{LETTERS}]{{{LENGTH}}})"', prompt.strip())
    if found is None:
        raise ValueError(f"not a caption of the word world: {prompt!r}; write e.g. 'the word \"ABC\"'")
    return found[1]


def is_heldout(text: str) -> bool:
    """Whether a string is kept out of training, a pure function of the string."""
    digest = hashlib.blake2b(f"word:{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < HELDOUT_SHARE * 2**64


@functools.cache
def _split(heldout: bool) -> tuple[str, ...]:
    every = map("".join, itertools.product(LETTERS, repeat=LENGTH))
    return tuple(text for text in every if is_heldout(text) == heldout)


def train_texts() -> list[str]:
    """Strings that pre-training and RL may see, in alphabetical order."""
    return list(_split(False))


def heldout_texts() -> list[str]:
    """Strings for evaluation only, in alphabetical order."""
    return list(_split(True))


def train_captions() -> list[str]:
    """Captions that pre-training and RL may see."""
    return [caption(text) for text in _split(False)]


def heldout_captions() -> list[str]:
    """Captions for evaluation only."""
    return [caption(text) for text in _split(True)]


def draw_texts(rng: np.random.Generator, number: int, *, heldout: bool = False) -> list[str]:
    """`number` random strings of one side of the split."""
    pool = _split(heldout)
    return [pool[i] for i in rng.integers(len(pool), size=number)]


def render(text: str, rng: np.random.Generator, size: int = 32) -> NDArray[np.float32]:
    """One random drawing of the string: (3, size, size) in [0, 1], anti-aliased."""
    if size < 32:
        raise ValueError(f"three letters need 32 pixels, got size {size}")
    ink = np.zeros((size, size), np.float32)
    advance = CELL_WIDTH + 1
    left = int(rng.integers(1, size - LENGTH * advance + 1))
    top = int(rng.integers(size // 5, size - CAP_HEIGHT - size // 5 + 1))
    for i, letter in enumerate(text):
        glyph = _glyphs()[letter]
        x = left + i * advance + (CELL_WIDTH - glyph.shape[1]) // 2
        ink[top : top + CAP_HEIGHT, x : x + glyph.shape[1]] = glyph
    color = rng.uniform(0.5, 1.0, 3).astype(np.float32)
    return (color / color.max())[:, None, None] * ink


@functools.cache
def _glyphs() -> dict[str, NDArray[np.float32]]:
    return {letter: _glyph(letter) for letter in LETTERS}


def _glyph(letter: str) -> NDArray[np.float32]:
    """Ink of one bold letter (CAP_HEIGHT, <= CELL_WIDTH): drawn large, then scaled, wide ones narrowed."""
    font = ImageFont.load_default(96)
    canvas = Image.new("L", (192, 192))
    ImageDraw.Draw(canvas).text((40, 40), letter, font=font, fill=255, stroke_width=4)
    tight = canvas.crop(canvas.getbbox())
    width = min(CELL_WIDTH, max(3, round(tight.width * CAP_HEIGHT / tight.height)))
    scaled = tight.resize((width, CAP_HEIGHT), Image.Resampling.BOX)
    return np.asarray(scaled, np.float32) / np.float32(255)
