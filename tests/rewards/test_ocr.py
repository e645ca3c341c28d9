"""OCR reads what envs/captions/words.py draws."""

import numpy as np
import pytest
import torch

pytest.importorskip("rapidocr")

from rlflow.envs.captions.words import draw_texts, render
from rlflow.rewards import ocr as module
from rlflow.rewards.base import to_uint8
from rlflow.rewards.memory import BatchMemory
from rlflow.rewards.ocr import edit_distance, ink_strip, ocr, ocr_exact


def draw(texts, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([render(t, rng) for t in texts]))


@pytest.fixture(scope="module")
def words():
    """40 strings, held-out ones among them, and their drawings."""
    rng = np.random.default_rng(2)
    texts = draw_texts(rng, 25) + draw_texts(rng, 15, heldout=True)
    return texts, draw(texts)


def test_true_renders_are_read_and_other_texts_score_low(words):
    texts, images = words
    assert ocr_exact(images, texts).mean() >= 0.95
    assert ocr(images, texts).mean() >= 0.97
    others = texts[1:] + texts[:1]
    assert ocr_exact(images, others).mean() == 0
    assert ocr(images, others).mean() <= 0.2


def test_dark_text_on_light_ground_is_read_too(words):
    texts, images = words
    assert ocr_exact(1 - images[:10], texts[:10]).mean() >= 0.9


def test_the_strip_is_the_same_on_a_dark_and_on_a_light_ground(words):
    pixels = to_uint8(words[1])[0]
    assert np.array_equal(ink_strip(pixels), ink_strip(255 - pixels))
    assert ink_strip(pixels).shape[0] < pixels.shape[0]


def test_large_images_go_through_the_detector(words):
    texts, images = words
    large = torch.nn.functional.interpolate(images[:8], scale_factor=4, mode="bicubic").clamp(0, 1)
    assert ocr_exact(large, texts[:8]).mean() >= 0.85


def test_case_and_spaces_are_free_and_partial_text_scores_partly(words):
    texts, images = words
    read = ocr_exact(images[:1], [texts[0]])
    assert read == 1
    assert ocr_exact(images[:1], [" ".join(texts[0].lower())]) == 1
    assert ocr(images[:1], [texts[0] + "X"]) == pytest.approx(0.75)


def test_a_blank_image_says_nothing_and_scores_zero():
    assert ocr(torch.zeros(2, 3, 32, 32), ["ABC", "XYZ"]).tolist() == [0, 0]
    assert ink_strip(np.zeros((32, 32, 3), np.uint8)) is None


def test_a_failure_on_one_image_masks_only_it(words, monkeypatch):
    texts, images = words
    real, calls = module._engine(), []

    def engine(image, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("broken strip")
        return real(image, **options)

    monkeypatch.setattr(module, "_engine", lambda: engine)
    monkeypatch.setattr(module, "memory", BatchMemory(module._read_all))
    for fn in (ocr, ocr_exact):  # the second reads the memory of the first
        assert fn(images[:3], texts[:3]).isnan().tolist() == [False, True, False]
    assert len(calls) == 3


def test_a_row_without_text_has_no_score(words):
    _, images = words
    assert ocr(images[:1], [""]).isnan().all()


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance
