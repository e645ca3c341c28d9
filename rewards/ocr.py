"""Does the image say the text? Read by rapidocr (PP-OCRv6, offline: the models are inside its wheel).

    score = max(0, 1 - edit_distance(read, text) / len(text))      (Flow-GRPO's OCR reward, Liu et al. 2025)

Small images (one word, up to SMALL pixels) are cropped to their ink and go straight to the recogniser, at
about 9 ms an image on one thread; larger ones go through the text detector first, 25 ms.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlflow.rewards.memory import BatchMemory

if importlib.util.find_spec("rapidocr") is None:
    raise ImportError("the OCR reward needs rapidocr and onnxruntime: pip install 'rlflow-torch[image]'")

log = logging.getLogger(__name__)

SMALL = 64  # pixels; up to here an image holds one line
INK = 90  # of 255: a pixel that differs so much from the background is ink
STRIP_WIDTH = 96  # pixels at height 48; rapidocr's default pads a short word to 320, 2.7x the time


@functools.cache
def _engine() -> Any:
    """The reader; imported here because it takes a second."""
    from rapidocr import RapidOCR

    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    detector = {"Det.limit_side_len": 160, "Det.limit_type": "min"}
    return RapidOCR(
        params=threads
        | detector
        | {"Global.use_cls": False, "Global.log_level": "critical", "Rec.rec_img_shape": [3, 48, STRIP_WIDTH]}
    )


def ink_strip(pixels: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """What differs from the border's median colour in one image (H, W, 3), white on black; None if blank."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ink = np.abs(pixels.astype(np.int16) - np.median(border, 0).astype(np.int16)).max(-1)
    rows, cols = (np.flatnonzero((ink > INK).any(axis)) for axis in (1, 0))
    if len(rows) < 4:
        return None
    strip = ink[max(0, rows[0] - 3) : rows[-1] + 4, max(0, cols[0] - 1) : cols[-1] + 2]
    return np.repeat(np.pad(strip, ((0, 0), (4, 4)))[..., None], 3, -1).astype(np.uint8)


def _read_one(pixels: NDArray[np.uint8]) -> str | None:
    """Text of one image; None where the reader failed."""
    small = max(pixels.shape[:2]) <= SMALL
    strip = ink_strip(pixels) if small else np.ascontiguousarray(pixels[..., ::-1])  # it expects BGR
    if strip is None:
        return ""
    try:
        result = _engine()(strip, use_det=not small, use_cls=False, use_rec=True)
    except Exception as error:  # onnxruntime's and opencv's own kinds: this image has no score, the others do
        log.debug("OCR failed on one image: %s", error)
        return None
    return "".join(result.txts or ())


def _read_all(batch: NDArray[np.uint8]) -> list[str | None]:
    _engine()  # an engine that cannot start is the whole batch's error, not one image's
    return [_read_one(pixels) for pixels in batch]


memory = BatchMemory(_read_all)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).upper()


def _similarity(read: str | None, text: str) -> float:
    """Score of one image in [0, 1]; nan when it could not be read or there is no text to compare with."""
    wanted = _plain(text)
    if read is None or not wanted:
        return np.nan
    return max(0.0, 1 - edit_distance(_plain(read), wanted) / len(wanted))


def ocr(images: Tensor, text: Sequence[str]) -> Tensor:
    """(N,) in [0, 1]: 1 - edit distance / len(text) of what the image says; case and spaces are free."""
    pairs = zip(memory(images), text, strict=True)
    return torch.tensor([_similarity(read, wanted) for read, wanted in pairs])


def ocr_exact(images: Tensor, text: Sequence[str]) -> Tensor:
    """(N,) 1 where the image says exactly `text`, else 0."""
    scores = ocr(images, text)
    return torch.where(scores.isnan(), torch.nan, (scores == 1).float())
