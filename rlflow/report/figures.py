"""Captioned grids of images, and images before and after training side by side; curves.py has the learning curves.

Small images are enlarged by whole factors without smoothing, so that every pixel stays what the model made.
Right and wrong differ in colour (Okabe and Ito 2008, safe for colour-blind readers) and in shape (tick, cross).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from rlflow.report.curves import Panel, curves

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Panel", "before_after", "curves", "image_grid", "read_captions", "tiles"]

Color = tuple[int, int, int]
Mark = bool | None
PAPER: Color = (255, 255, 255)
INK: Color = (38, 42, 48)
FAINT: Color = (110, 117, 126)
EDGE: Color = (210, 214, 220)
RIGHT: Color = (0, 158, 115)
WRONG: Color = (213, 94, 0)
TILE = 128  # pixels that an enlarged image has at least
GAP = 14
CAPTION_LINES = 3
TEXT_SIZE = 13


def image_grid(
    images: Tensor,
    captions: Sequence[str],
    path: str | Path,
    *,
    columns: int | None = None,
    scale: int | None = None,
    marks: Sequence[Mark] | None = None,
) -> Path:
    """Write images (N, 3, H, W) in [0, 1] with their captions as a PNG; the captions are in its text too.

    `scale` defaults to what makes an image 128 pixels wide, `columns` to a picture a little wider than high.
    """
    _check_lengths(len(images), captions=captions, marks=marks)
    pictures = [
        _framed(tile, mark) for tile, mark in zip(tiles(images, scale), marks or [None] * len(images), strict=True)
    ]
    return _save(_layout(pictures, captions, columns, header=None), path, captions)


def before_after(
    images_before: Tensor,
    images_after: Tensor,
    captions: Sequence[str],
    path: str | Path,
    marks: tuple[Sequence[Mark], Sequence[Mark]] | None = None,
    *,
    columns: int | None = None,
    scale: int | None = None,
) -> Path:
    """Write pairs of images (N, 3, H, W) in [0, 1] in pairs as a PNG; `marks`: which are right (before, after)."""
    first, second = marks or ([None] * len(captions), [None] * len(captions))
    _check_lengths(len(captions), images_before=images_before, images_after=images_after, marks=first)
    _check_lengths(len(captions), marks=second)
    rows = zip(tiles(images_before, scale), first, tiles(images_after, scale), second, strict=True)
    pairs = [_pair(_framed(a, right_a), _framed(b, right_b)) for a, right_a, b, right_b in rows]
    return _save(_layout(pairs, captions, columns, header=("before", "after")), path, captions)


def read_captions(path: str | Path) -> list[str]:
    """The captions that `image_grid` wrote into a PNG; [] for any other PNG."""
    with Image.open(path) as image:
        return json.loads(image.info.get("captions", "[]"))


def tiles(images: Tensor, scale: int | None = None) -> list[Image.Image]:
    """Images (N, 3, H, W) in [0, 1] or uint8 as pictures, enlarged by the whole factor `scale` (default: to 128)."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}: expected (N, 3, H, W)")
    if images.is_floating_point():
        images = (images.float().nan_to_num().clamp(0, 1) * 255).round().byte()
    factor = scale or math.ceil(TILE / images.shape[-1])
    arrays: NDArray[np.uint8] = images.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a.repeat(factor, 0).repeat(factor, 1)) for a in arrays]


def _check_lengths(num: int, **columns: Sequence[object] | Tensor | None) -> None:
    for name, column in columns.items():
        if column is not None and len(column) != num:
            raise ValueError(f"{name} has {len(column)} entries where {num} are needed: one per image")


def _framed(tile: Image.Image, mark: Mark) -> Image.Image:
    """The tile in a thin frame, or in a thick one of the mark's colour with its sign in the corner."""
    width = 1 if mark is None else 4
    color = EDGE if mark is None else RIGHT if mark else WRONG
    framed = Image.new("RGB", (tile.width + 8, tile.height + 8), PAPER)
    framed.paste(color, (4 - width, 4 - width, tile.width + 4 + width, tile.height + 4 + width))
    framed.paste(tile, (4, 4))
    if mark is not None:
        badge = _badge(mark)
        framed.paste(badge, (framed.width - badge.width, 0), badge)
    return framed


def _badge(right: bool, size: int = 24) -> Image.Image:
    """A tick or a cross on a coloured ground, drawn four times as large and reduced to be smooth."""
    s = 4 * size
    badge = Image.new("RGBA", (s, s))
    draw = ImageDraw.Draw(badge)
    draw.rounded_rectangle(
        (0, 0, s, s), radius=s // 4, corners=(False, False, False, True), fill=RIGHT if right else WRONG
    )
    strokes = ["28 52 44 68 72 34"] if right else ["32 32 68 68", "68 32 32 68"]
    for stroke in strokes:
        numbers = [int(n) * s / 100 for n in stroke.split()]
        draw.line(list(zip(numbers[::2], numbers[1::2], strict=True)), fill=PAPER, width=s // 10, joint="curve")
    return badge.resize((size, size), Image.Resampling.LANCZOS)


def _pair(before: Image.Image, after: Image.Image) -> Image.Image:
    """Two pictures next to each other."""
    both = Image.new("RGB", (before.width + after.width + 4, max(before.height, after.height)), PAPER)
    both.paste(before, (0, 0))
    both.paste(after, (before.width + 4, 0))
    return both


def _layout(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int | None, header: tuple[str, str] | None
) -> Image.Image:
    """All pictures on one page, each above its caption; `header` names the two halves of a picture."""
    if not pictures:
        return Image.new("RGB", (TILE, TILE), PAPER)
    font = ImageFont.load_default(TEXT_SIZE)
    width, height = max(96, *(p.width for p in pictures)), max(p.height for p in pictures)
    columns = min(len(pictures), columns or _columns(len(pictures), width / height))
    texts = [_wrap(caption, width, font) for caption in captions]
    line = TEXT_SIZE + 4
    cell = height + 5 + line * max(len(t) for t in texts) + GAP
    top = GAP + (line + 4 if header else 0)
    rows = math.ceil(len(pictures) / columns)
    page = Image.new("RGB", (GAP + columns * (width + GAP), top + rows * cell), PAPER)
    draw = ImageDraw.Draw(page)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = GAP + (i % columns) * (width + GAP), top + (i // columns) * cell
        page.paste(picture, (x + (width - picture.width) // 2, y))
        for n, words in enumerate(text):
            draw.text((x + width / 2, y + height + 5 + n * line), words, fill=INK, font=font, anchor="ma")
    for i in range(columns if header else 0):
        for half, word in zip((0.25, 0.75), header or (), strict=True):
            draw.text((GAP + i * (width + GAP) + half * width, GAP), word, fill=FAINT, font=font, anchor="ma")
    return page


def _columns(num: int, aspect: float) -> int:
    """Columns that make a page of cells with this width / height about 1.6 times as wide as high, with few gaps."""
    ideal = max(1, round(math.sqrt(1.6 * num / aspect)))
    near = range(max(1, ideal - 1), ideal + 2)
    return min(near, key=lambda columns: (-num % columns, abs(columns - ideal)))


def _wrap(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """At most three lines of `width` pixels; a word that is too long is cut, an ellipsis ends what does not fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    more = len(lines) > CAPTION_LINES
    lines = lines[:CAPTION_LINES]
    return [_fit(line, width, font, more and n == CAPTION_LINES - 1) for n, line in enumerate(lines)]


def _fit(line: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, more: bool) -> str:
    if not more and font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."


def _save(page: Image.Image, path: str | Path, captions: Sequence[str]) -> Path:
    info = PngInfo()
    info.add_text("captions", json.dumps(list(captions)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, format="PNG", pnginfo=info)
    return path
