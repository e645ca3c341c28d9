"""Train the judge of words (rewards/word_judge.py) on true renders of training strings.

    python scripts/train_word_judge.py --out rlflow/assets/word_judge        # about a CPU minute on one thread

Images are spoilt as those of train_judge.py are. In some a place is blank or filled with blocks that are no letter,
so that the judge can say "none". Held-out strings are never drawn.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from train_judge import Lesson, main

from rlflow.envs.words import CAP_HEIGHT, CELL_WIDTH, LENGTH, draw_texts, render
from rlflow.rewards.word_judge import WordCNN, classes

NO_LETTER = 0.15
"""Share of images in which one place holds no letter; in half of them it is blank."""


def render_texts(rng: np.random.Generator, number: int, heldout: bool) -> tuple[Tensor, list[str]]:
    """True renders (N, 3, 32, 32) of strings of one side of the split."""
    texts = draw_texts(rng, number, heldout=heldout)
    return torch.from_numpy(np.stack([render(text, rng) for text in texts])), texts


def draw_batch(rng: np.random.Generator, number: int) -> tuple[Tensor, list[str]]:
    """Renders of training strings, some with a place that holds no letter, a space in the target."""
    images, texts = render_texts(rng, number, heldout=False)
    for i in np.flatnonzero(rng.random(number) < NO_LETTER):
        place = int(rng.integers(LENGTH))
        texts[i] = texts[i][:place] + " " + texts[i][place + 1 :]
        _erase(images[i], place, rng)
    return images, texts


def _erase(image: Tensor, place: int, rng: np.random.Generator) -> None:
    """Empty one place of an image (3, H, W), or fill it with random blocks of the ink's colour."""
    rows = torch.arange(image.shape[1])[image.amax((0, 2)) > 0]
    left = 1 + place * (CELL_WIDTH + 1)
    box = image[:, rows[0] : rows[-1] + 1, left : left + CELL_WIDTH + 1]
    color = image.amax((1, 2), keepdim=True)
    box.zero_()
    if rng.random() < 0.5:
        blocks = np.repeat(np.repeat(rng.random((5, 3)) < 0.5, 3, 0), 3, 1)[:CAP_HEIGHT]
        box[..., :CELL_WIDTH] = color * torch.from_numpy(blocks[: box.shape[1]].astype(np.float32))


def loss_of(model: WordCNN, images: Tensor, texts: list[str]) -> Tensor:
    """Cross-entropy of the three places."""
    return F.cross_entropy(model(images).flatten(0, 1), classes(texts).flatten())


def right_texts(model: WordCNN, images: Tensor, texts: list[str]) -> Tensor:
    """(N,) bool: the judge reads the string in the image."""
    return (model(images).argmax(-1) == classes(texts)).all(1)


WORDS = Lesson("word_cnn", "train_word_judge.py", WordCNN, draw_batch, render_texts, loss_of, right_texts, steps=800)

if __name__ == "__main__":
    main(WORDS)
