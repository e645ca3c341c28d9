"""Train the judge of words (rewards/word_judge.py) on true renders of training strings.

    python scripts/train_word_judge.py --out rlflow/assets/word_judge        # about a CPU minute on one thread

Images are spoilt as those of train_judge.py are. In some of them places are blank or filled with blocks that are no
letter, so that the judge can say "none". Held-out strings are never drawn.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from train_judge import Lesson, main

from rlflow.envs.captions.words import CAP_HEIGHT, CELL_WIDTH, LENGTH, draw_texts, render
from rlflow.rewards.word_judge import WordCNN, classes

NO_LETTER = 0.2
"""Share of images in which a place holds no letter with probability 1/2; half of such places are blank."""


def render_texts(rng: np.random.Generator, number: int, heldout: bool) -> tuple[Tensor, list[str]]:
    """True renders (N, 3, 32, 32) of strings of one side of the split."""
    texts = draw_texts(rng, number, heldout=heldout)
    return torch.from_numpy(np.stack([render(text, rng) for text in texts])), texts


def draw_batch(rng: np.random.Generator, number: int) -> tuple[Tensor, list[str]]:
    """Renders of training strings, some with places that hold no letter, spaces in the target."""
    images, texts = render_texts(rng, number, heldout=False)
    for i in np.flatnonzero(rng.random(number) < NO_LETTER):
        texts[i] = _erase(images[i], texts[i], rng)
    return images, texts


def _erase(image: Tensor, text: str, rng: np.random.Generator) -> str:
    """Empty places of an image (3, H, W), or fill them with random blocks of the ink's colour; what is left of it."""
    top = int((image.amax((0, 2)) > 0).nonzero()[0])
    color = image.amax((1, 2), keepdim=True)
    places = np.flatnonzero(rng.random(LENGTH) < 0.5)
    for place in places:
        left = 1 + place * (CELL_WIDTH + 1)
        box = image[:, top : top + CAP_HEIGHT, left : left + CELL_WIDTH + 1]
        box.zero_()
        if rng.random() < 0.5:
            blocks = np.kron(rng.random((5, 3)) < 0.5, np.ones((3, 3), np.float32))[:CAP_HEIGHT]
            box[..., :CELL_WIDTH] = color * torch.from_numpy(blocks.astype(np.float32))
    return "".join(" " if i in places else letter for i, letter in enumerate(text))


def loss_of(model: WordCNN, images: Tensor, texts: list[str]) -> Tensor:
    """Cross-entropy of the three places."""
    return F.cross_entropy(model(images).flatten(0, 1), classes(texts).flatten())


def right_texts(model: WordCNN, images: Tensor, texts: list[str]) -> Tensor:
    """(N,) bool: the judge reads the string in the image."""
    return (model(images).argmax(-1) == classes(texts)).all(1)


WORDS = Lesson("word_cnn", "train_word_judge.py", WordCNN, draw_batch, render_texts, loss_of, right_texts, steps=800)

if __name__ == "__main__":
    main(WORDS)
