"""Does the image say the word? Read by a small network of our own, which shares nothing with the OCR reward.

Trained on true renders of training strings (scripts/train_word_judge.py): convolutions, the maximum over the
height, and for each of the three places one of the 26 letters or "none". What rises under this judge as well as
under rapidocr is better writing, not something that rapidocr happens to read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from numpy.typing import NDArray
from torch import Tensor

import rlflow
from rlflow.envs.captions.words import LENGTH, LETTERS
from rlflow.rewards.judges import SIZE, block, load_network, small_images
from rlflow.rewards.memory import BatchMemory

FOLDER = Path(rlflow.__file__).parent / "assets" / "word_judge"
NONE = len(LETTERS)
"""The class of a place that holds no letter."""


class WordCNN(nn.Module):
    """Which letter stands at each of the three places."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        wide = 3 * width // 2
        self.trunk = nn.Sequential(
            *block(3, width // 2, 5, 2),
            *block(width // 2, width, 3, 1),
            *block(width, wide, 3, 2),
            *block(wide, wide, 3, 1),
        )
        self.letters = nn.Linear(wide * SIZE // 4, LENGTH * (NONE + 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) in [0, 1] to logits (N, 3, 27) over A to Z and none."""
        columns = self.trunk(2 * images - 1).amax(2)  # wherever in the height the word stands
        return self.letters(columns.flatten(1)).unflatten(1, (LENGTH, NONE + 1))


def classes(texts: Sequence[str]) -> Tensor:
    """(N, 3) classes of the letters of three-letter strings; what is no capital letter is NONE."""
    return torch.tensor([[LETTERS.index(c) if c in LETTERS else NONE for c in text] for text in texts])


@functools.cache
def load_judge() -> WordCNN:
    """The network that ships with the package, in evaluation mode."""
    return load_network(WordCNN, FOLDER)


@torch.no_grad()
def _read(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.cat([load_judge()(part).argmax(-1) for part in small_images(pixels)])


memory = BatchMemory(_read)


def word_judge(images: Tensor, text: Sequence[str]) -> Tensor:
    """(N,) 1 where the network reads exactly `text`, else 0; nan for a text that is not three letters A to Z."""
    plain = ["".join(words.split()).upper() for words in text]
    readable = torch.tensor([len(word) == LENGTH and all(c in LETTERS for c in word) for word in plain])
    wanted = classes([word if ok else " " * LENGTH for word, ok in zip(plain, readable, strict=True)])
    right = (memory(images) == wanted).all(1).float()
    return torch.where(readable, right, torch.nan)
