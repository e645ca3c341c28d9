"""The judges that no reward sees: the shipped network, diversity, distance to the base model."""

import ast
import inspect
import json

import numpy as np
import pytest
import torch

from rlflow.envs.captions.scenes import draw_captions, parse, render
from rlflow.rewards import judges
from rlflow.rewards.base import column_names
from rlflow.rewards.judges import (
    ASSETS,
    THINGS,
    base_distance,
    cnn_judge,
    diversity,
    load_judge,
    second_judge,
    thing_counts,
)


def draw(captions, seed=0, size=32):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([render(parse(c), rng, size) for c in captions]))


@pytest.fixture(params=[cnn_judge, second_judge], ids=["first", "second"])
def judge(request):
    """Either network."""
    return request.param


@pytest.fixture(scope="module")
def heldout():
    """400 held-out captions, which the judge's training never drew, and their renders."""
    captions = draw_captions(np.random.default_rng(3), 400, heldout=True)
    return captions, draw(captions)


def test_the_judge_knows_true_renders_of_captions_it_never_saw(heldout, judge):
    captions, images = heldout
    assert judge(images, captions).mean() >= 0.95
    spoilt = (images + 0.05 * torch.randn(images.shape)).clamp(0, 1)
    assert judge(spoilt, captions).mean() >= 0.9


def test_shuffled_captions_are_wrong(heldout, judge):
    captions, images = heldout
    shuffled = captions[1:] + captions[:1]
    differ = torch.tensor([a != b for a, b in zip(captions, shuffled, strict=True)])
    assert judge(images, shuffled)[differ].mean() <= 0.01


@pytest.mark.parametrize(
    ("drawn", "asked", "verdict"),
    [
        ("three red circles", "two red circles", 0),
        ("three red circles", "three purple circles", 0),
        ("three red circles", "three red squares", 0),
        ("a red circle left of a blue square", "a red circle right of a blue square", 0),
        ("a red circle left of a blue square", "a blue square right of a red circle", 1),
        ("a red circle left of a blue square", "a red circle and a blue square", 1),
    ],
)
def test_every_part_matters(drawn, asked, verdict, judge):
    assert (judge(draw([drawn] * 20), [asked] * 20).mean() - verdict).abs() <= 0.1


def test_an_empty_image_and_noise_are_wrong(heldout, judge):
    captions, _ = heldout
    assert judge(torch.zeros(50, 3, 32, 32), captions[:50]).sum() == 0
    assert judge(torch.rand(50, 3, 32, 32), captions[:50]).sum() == 0


def test_larger_images_are_scaled_down(heldout, judge):
    captions, _ = heldout
    assert judge(draw(captions[:50], size=64), captions[:50]).mean() >= 0.9


def test_permuting_rows_permutes_verdicts(heldout, judge):
    captions, images = heldout
    noisy = (images + 0.45 * torch.randn(images.shape)).clamp(0, 1)
    order = torch.randperm(len(captions))
    plain = judge(noisy, captions)
    assert 0.05 < plain.mean() < 0.95
    assert torch.equal(judge(noisy[order], [captions[i] for i in order]), plain[order])


@pytest.mark.parametrize("name", ["judge", "second_judge"])
def test_the_judge_is_small_learned_and_says_what_made_it(name):
    assert sum(p.numel() for p in load_judge(name).parameters()) < 200_000
    assert not any(p.requires_grad for p in load_judge(name).parameters())
    made_by = json.loads((ASSETS / name / "config.json").read_text())["made_by"]
    assert "scripts/train_judge.py" in made_by["command"]
    assert made_by["accuracy"]["heldout"]["true"] >= 0.95
    modules = [n.module for n in ast.walk(ast.parse(inspect.getsource(judges))) if isinstance(n, ast.ImportFrom)]
    assert "rlflow.rewards.shapes" not in modules  # independent of the verifier it is to check


def test_the_networks_differ(heldout):
    """Of noise they think different things, so what fools one need not fool the other."""
    first, second = (load_judge(name)(torch.rand(20, 3, 32, 32))[0] for name in ("judge", "second_judge"))
    assert (first - second).abs().mean() > 0.01


def test_thing_counts_by_hand():
    counts = thing_counts(parse("three red circles"))
    assert counts.sum() == 3
    assert THINGS[int(counts.argmax())].color == "red"
    assert thing_counts(parse("a red circle and a blue square")).sum() == 2


def test_diversity_is_the_mean_pairwise_rms_distance_inside_the_group():
    images = torch.rand(7, 3, 4, 4)
    group = torch.tensor([4, 9, 4, 9, 9, 4, 2])
    got = diversity(images, group)

    def rms(i, j):
        return (images[i] - images[j]).square().mean().sqrt()

    assert got[0] == pytest.approx(float((rms(0, 2) + rms(0, 5)) / 2), abs=1e-6)
    pairs = torch.stack([rms(1, 3), rms(1, 4), rms(3, 4)])
    assert got[group == 9].mean() == pytest.approx(float(pairs.mean()), abs=1e-6)
    assert got[6].isnan()  # a group of one has no pair: no number, not zero
    same = diversity(images[:1].expand(4, -1, -1, -1), torch.zeros(4, dtype=torch.long))
    assert same.tolist() == [0] * 4
    apart = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    assert diversity(apart, torch.zeros(2, dtype=torch.long)).tolist() == [1, 1]


def test_base_distance_is_zero_at_the_base_and_one_at_the_most():
    images = torch.rand(5, 3, 4, 4)
    assert base_distance(images, images).tolist() == [0] * 5
    assert base_distance(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)).tolist() == [1, 1]
    torch.testing.assert_close(base_distance(images + 0.25, images), torch.full((5,), 0.25))


def test_judges_name_the_columns_they_need():
    assert column_names(cnn_judge) == ("images", "prompt")
    assert column_names(diversity) == ("images", "group")
    assert column_names(base_distance) == ("images", "base_images")
