"""The word world: captions and strings are one to one, the split is fixed, letters are legible."""

import hashlib

import numpy as np
import pytest
import torch

from rlflow.envs.captions import words
from rlflow.envs.captions.words import (
    LETTERS,
    caption,
    draw_texts,
    heldout_texts,
    is_heldout,
    parse,
    render,
    train_texts,
)


def test_caption_and_parse_are_inverse():
    assert caption("ABC") == 'the word "ABC"'
    assert all(parse(caption(text)) == text for text in heldout_texts())


@pytest.mark.parametrize("text", ["ABC", 'the word "AB"', 'the word "abc"', 'the word "ABCD"', "three red circles"])
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match='the word "ABC"'):
        parse(text)


def test_split_covers_everything_once_and_holds_out_a_fifth():
    train, heldout = set(train_texts()), set(heldout_texts())
    assert not train & heldout
    assert len(train) + len(heldout) == 26**3
    assert len(heldout) / 26**3 == pytest.approx(0.2, abs=0.01)
    assert words.train_captions() == [caption(text) for text in train_texts()]
    assert words.heldout_captions() == [caption(text) for text in heldout_texts()]
    assert {letter for text in heldout for letter in text} == set(LETTERS)


FROZEN = "0e1e77f3afe6e75f"


def test_split_never_changes():
    assert hashlib.sha256("\n".join(heldout_texts()).encode()).hexdigest().startswith(FROZEN)


def test_drawn_strings_stay_on_their_side():
    rng = np.random.default_rng(0)
    assert not any(map(is_heldout, draw_texts(rng, 300)))
    assert all(map(is_heldout, draw_texts(rng, 300, heldout=True)))


def test_drawing_is_a_function_of_the_generator_and_varies():
    first, again = (render("QRS", np.random.default_rng(1)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    rng = np.random.default_rng(0)
    images = np.stack([render("QRS", rng) for _ in range(30)])
    assert images.shape == (30, 3, 32, 32)
    assert images.dtype == np.float32
    assert images.min() == 0
    assert 0.95 < images.max() <= 1
    assert len(np.unique(images.max(axis=(2, 3)).argmax(1))) == 3, "the colour varies"
    assert len({int(np.nonzero(image.max((0, 2)))[0][0]) for image in images}) > 2, "the height varies"


def test_letters_are_whole_and_told_apart():
    """Every letter differs from every other by a good share of its ink, and no ink leaves the image."""
    glyphs = words._glyphs()
    padded = {k: np.pad(g, ((0, 0), (0, words.CELL_WIDTH - g.shape[1]))) for k, g in glyphs.items()}
    for a in LETTERS:
        for b in LETTERS:
            if a < b:
                assert np.abs(padded[a] - padded[b]).sum() > 0.15 * padded[a].sum(), (a, b)
    rng = np.random.default_rng(0)
    ink = sum(glyphs[letter].sum() for letter in "WMB")
    assert all(render("WMB", rng).max(0).sum() == pytest.approx(ink, rel=1e-4) for _ in range(20))


def test_too_small_a_canvas_is_refused():
    with pytest.raises(ValueError, match="32 pixels"):
        render("ABC", np.random.default_rng(0), size=24)


@pytest.mark.slow
def test_text_recognition_reads_true_drawings():
    pytest.importorskip("rapidocr")
    from rlflow.rewards.ocr import ocr_exact

    rng = np.random.default_rng(0)
    texts = draw_texts(rng, 200)
    images = torch.from_numpy(np.stack([render(text, rng) for text in texts]))
    assert torch.as_tensor(ocr_exact(images, texts)).mean() >= 0.97
