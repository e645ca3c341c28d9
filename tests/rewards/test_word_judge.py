"""The judge of words reads true renders, spoilt ones too, and says no to what is not the word."""

import ast
import inspect
import json

import numpy as np
import pytest
import torch

from rlflow.envs.captions.words import draw_texts, render
from rlflow.rewards import word_judge as module
from rlflow.rewards.base import column_names
from rlflow.rewards.word_judge import FOLDER, NONE, classes, load_judge, word_judge


def draw(texts, seed=0, size=32):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([render(text, rng, size) for text in texts]))


@pytest.fixture(scope="module")
def heldout():
    """400 strings that the judge's training never drew, and their renders."""
    texts = draw_texts(np.random.default_rng(3), 400, heldout=True)
    return texts, draw(texts)


def test_it_reads_strings_it_never_saw(heldout):
    texts, images = heldout
    assert word_judge(images, texts).mean() >= 0.98
    spoilt = (images + 0.05 * torch.randn(images.shape)).clamp(0, 1)
    assert word_judge(spoilt, texts).mean() >= 0.95


def test_one_wrong_letter_is_wrong(heldout):
    """At each of the three places."""
    texts, images = heldout
    for place in range(3):
        other = [t[:place] + chr((ord(t[place]) - 64) % 26 + 65) + t[place + 1 :] for t in texts]
        assert word_judge(images, other).mean() <= 0.01


def test_a_place_without_a_letter_is_no_letter(heldout):
    """Blank, half erased in height, or noise all over."""
    texts, images = heldout
    for place in range(3):
        erased = images.clone()
        erased[..., 1 + 10 * place : 11 + 10 * place] = 0
        assert word_judge(erased, texts).mean() <= 0.02
    assert (load_judge()(torch.zeros(1, 3, 32, 32)).argmax(-1) == NONE).all()
    assert word_judge(torch.rand(100, 3, 32, 32), texts[:100]).sum() == 0


def test_larger_images_are_scaled_down():
    texts = draw_texts(np.random.default_rng(4), 50)
    large = draw(texts).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert word_judge(large, texts).mean() >= 0.95


def test_permuting_rows_permutes_verdicts(heldout):
    texts, images = heldout
    noisy = (images + 0.5 * torch.randn(images.shape)).clamp(0, 1)
    order, plain = torch.randperm(len(texts)), word_judge(noisy, texts)
    assert 0.02 < plain.mean() < 0.98
    assert torch.equal(word_judge(noisy[order], [texts[i] for i in order]), plain[order])


def test_a_text_it_cannot_know_has_no_score(heldout):
    """Neither right nor wrong; case and spaces are free, as for the reward."""
    texts, images = heldout
    asked = [texts[0].lower(), f" {texts[1]} ", "HELLO", "A1B", "AB"]
    scores = word_judge(images[:5], asked)
    assert scores[:2].tolist() == [1, 1]
    assert scores[2:].isnan().all()


def test_classes_by_hand():
    assert classes(["AZ "]).tolist() == [[0, 25, NONE]]


def test_it_is_small_and_shares_nothing_with_the_reward():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000
    made_by = json.loads((FOLDER / "config.json").read_text())["made_by"]
    assert "scripts/train_word_judge.py" in made_by["command"]
    assert made_by["accuracy"]["heldout_spoilt"]["true"] >= 0.95
    modules = [n.module for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.ImportFrom)]
    assert "rlflow.rewards.ocr" not in modules
    assert column_names(word_judge) == ("images", "text")
