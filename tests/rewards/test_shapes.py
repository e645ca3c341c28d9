"""The verifier: right on true renders, wrong on everything else, every part by itself."""

import logging
import threading
import time

import numpy as np
import pytest
import torch

from rlflow.envs.captions.scenes import COLORS, OPPOSITE, SHAPES, draw_captions, parse, render
from rlflow.rewards import shapes
from rlflow.rewards.base import Reward, RewardSet, to_uint8
from rlflow.rewards.memory import BatchMemory
from rlflow.rewards.shapes import PARTS, detect, shapes_parts, shapes_soft, shapes_strict


def draw(captions, seed=0, size=32):
    """(N, 3, size, size) true renders."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([render(parse(c), rng, size) for c in captions]))


@pytest.fixture(scope="module")
def world():
    """500 captions of both sides of the split and their renders."""
    rng = np.random.default_rng(5)
    captions = draw_captions(rng, 350) + draw_captions(rng, 150, heldout=True)
    return captions, draw(captions)


def parts_of(drawn, asked):
    """The parts of one render of `drawn` judged against `asked`, mean over ten renders."""
    return {k: float(v.mean()) for k, v in shapes_parts(draw([drawn] * 10), [asked] * 10).items()}


def test_true_renders_are_right_and_shuffled_captions_wrong(world):
    captions, images = world
    assert shapes_strict(images, captions).mean() >= 0.97
    assert shapes_soft(images, captions).mean() >= 0.99
    shuffled = [captions[i] for i in np.random.default_rng(0).permutation(len(captions))]
    differ = torch.tensor([a != b for a, b in zip(captions, shuffled, strict=True)])
    assert shapes_strict(images, shuffled)[differ].mean() <= 0.01
    assert shapes_soft(images, shuffled)[differ].mean() <= 0.5


@pytest.mark.parametrize(("noise", "floor"), [(0.05, 0.97), (0.1, 0.95)])
def test_noise_is_borne(world, noise, floor):
    captions, images = world
    noisy = (images + noise * torch.randn(images.shape)).clamp(0, 1)
    assert shapes_strict(noisy, captions).mean() >= floor


@pytest.mark.parametrize("size", [24, 48, 96])
def test_other_sizes_work_too(size):
    captions = draw_captions(np.random.default_rng(1), 100)
    assert shapes_strict(draw(captions, size=size), captions).mean() >= 0.96


@pytest.mark.parametrize("image", [torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
def test_an_empty_or_full_image_is_never_right(image, world):
    captions = [*world[0][:60], "one white square"]
    images = image.expand(61, 3, 32, 32)
    assert shapes_strict(images, captions).sum() == 0
    assert shapes_soft(images, captions).max() <= (0 if image.sum() == 0 else 0.67)


def test_pure_noise_is_never_right(world):
    captions = world[0][:200]
    assert shapes_strict(torch.rand(200, 3, 32, 32), captions).sum() == 0


@pytest.mark.parametrize(
    ("drawn", "asked", "wrong"),
    [
        ("three red circles", "two red circles", {"count"}),
        ("one red circle", "four red circles", {"count"}),
        ("two red circles", "two blue circles", {"color"}),
        ("two red circles", "two red squares", {"shape"}),
        ("one white triangle", "one white circle", {"shape"}),
        ("a red circle and a blue square", "a red circle and a green square", {"color", "shape"}),
        ("a red circle and a blue square", "a red square and a blue circle", {"shape"}),
        ("a red circle and a blue square", "a red circle and a blue triangle", {"shape"}),
        ("one red circle", "a red circle and a blue square", {"count", "color", "shape"}),
        ("a red circle left of a blue square", "a red circle right of a blue square", {"relation"}),
        ("a red circle left of a blue square", "a red circle above a blue square", {"relation"}),
        ("a red circle left of a blue square", "a blue square left of a red circle", {"relation"}),
        ("a red circle above a blue square", "a red circle below a blue square", {"relation"}),
        ("a red circle above a blue square", "a blue square below a red circle", set()),
        ("a red circle left of a blue square", "a blue square and a red circle", set()),
    ],
)
def test_every_part_fails_by_itself(drawn, asked, wrong):
    parts = parts_of(drawn, asked)
    for name, value in parts.items():
        if name == "relation" and parse(asked).relation is None:
            assert np.isnan(value)
        else:
            assert value == (0.0 if name in wrong else 1.0), (name, parts)


@pytest.mark.parametrize("relation", OPPOSITE)
def test_mirrored_scenes_have_the_opposite_relation(relation):
    asked = f"a green triangle {relation} a white circle"
    images = draw([asked] * 40)
    flip = 3 if relation in ("left of", "right of") else 2
    mirrored = images.flip(flip)
    assert shapes_parts(images, [asked] * 40)["relation"].mean() == 1
    assert shapes_parts(mirrored, [asked] * 40)["relation"].mean() == 0
    opposite = f"a green triangle {OPPOSITE[relation]} a white circle"
    assert shapes_parts(mirrored, [opposite] * 40)["relation"].mean() == 1


def test_soft_counts_partial_success():
    three = draw(["three red circles"])
    assert shapes_soft(three, ["four red circles"]) == pytest.approx((0.75 + 1 + 1) / 3)
    assert shapes_soft(three, ["three blue squares"]) == pytest.approx(1 / 3)
    one = draw(["one red circle"])
    assert shapes_soft(one, ["a red circle above a blue square"]) == pytest.approx((0.5 + 0.5 + 0.5 + 0) / 4)


def test_strict_is_where_soft_is_one_and_parts_agree(world):
    captions, images = world
    noisy = (images + 0.2 * torch.randn(images.shape)).clamp(0, 1)
    strict, soft = shapes_strict(noisy, captions), shapes_soft(noisy, captions)
    assert 0 < strict.mean() < 1
    assert torch.equal(strict == 1, soft == 1)
    parts = torch.stack(list(shapes_parts(noisy, captions).values()), 1)
    assert torch.equal((parts.isnan() | (parts == 1)).all(1), strict == 1)
    assert tuple(shapes_parts(noisy, captions)) == PARTS


def _bitmap(ink):
    """A red drawing of the bool map `ink` (32, 32)."""
    return (torch.from_numpy(ink).float() * torch.tensor([0.9, 0.16, 0.16]).view(3, 1, 1))[None]


def _forms():
    y, x = np.mgrid[:32, :32] - 15.5
    round_, cross = np.hypot(x, y), np.minimum(abs(x), abs(y))
    return {
        "ring": (round_ < 7) & (round_ > 3.5),
        "bar": (abs(x) < 8) & (abs(y) < 3),
        "short bar": (abs(x) < 6) & (abs(y) < 4),
        "diamond": abs(x) + abs(y) < 7,
        "plus": (cross < 1.6) & (np.maximum(abs(x), abs(y)) < 6),
        "upside-down T": (abs(y) < 6) & (abs(x) < np.where(y > 3, 6, 1.6)),
        "upside-down triangle": (abs(x) < (6 - y) * 0.5) & (abs(y) < 6),
        "lying triangle": (abs(y) < (6 - x) * 0.5) & (abs(x) < 6),
    }


@pytest.mark.parametrize("form", _forms())
def test_other_forms_have_no_shape(form):
    image = _bitmap(_forms()[form]).expand(3, -1, -1, -1)
    parts = shapes_parts(image, [f"one red {s}" for s in SHAPES])
    assert parts["count"].tolist() == [1, 1, 1]
    assert parts["color"].tolist() == [1, 1, 1]
    assert parts["shape"].tolist() == [0, 0, 0]


def test_a_region_of_mixed_colours_has_no_colour():
    red, blue = (torch.tensor(COLORS[c]).view(3, 1, 1) for c in ("red", "blue"))
    inside = torch.zeros(32, 32)
    inside[10:20, 10:20] = 1
    mixed = inside * torch.where(torch.arange(32) % 2 == 0, red, blue)
    parts = shapes_parts(mixed.expand(3, 3, 32, 32), [f"one {c} square" for c in ("red", "blue", "purple")])
    assert parts["color"].tolist() == [0, 0, 0]


def test_specks_are_no_objects_and_a_fifth_object_is():
    asked = "one green square"
    image = draw([asked])
    specked = image.clone()
    specked[:, :, :2, :2] = 1
    assert shapes_strict(specked, [asked]) == 1
    littered = image.clone()
    corner = image[0, 1].sum(0).argmin()  # a column without the square
    littered[:, :, 1:6, max(1, int(corner) - 2) : int(corner) + 3] = 1
    assert shapes_strict(littered, [asked]) == 0


def test_the_objects_of_one_image_never_leak_into_the_next(world):
    _, images = world
    together = detect(to_uint8(images[:50]))
    assert together == [detect(to_uint8(image[None]))[0] for image in images[:50]]


def test_permuting_rows_permutes_scores(world):
    captions, images = world
    noisy = (images + 0.15 * torch.randn(images.shape)).clamp(0, 1)
    order = torch.randperm(len(captions))
    plain = shapes_soft(noisy, captions)
    assert torch.equal(shapes_soft(noisy[order], [captions[i] for i in order]), plain[order])
    assert len(plain.unique()) > 3


def test_a_foreign_prompt_masks_its_row_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(shapes, "_complained", set())
    images = draw(["one red circle"] * 2)
    with caplog.at_level(logging.WARNING):
        for fn in (shapes_strict, shapes_soft):
            scores = fn(images, ["one red circle", "a photo of a cat"])
            assert scores[0] == 1
            assert scores[1].isnan()
    assert len(caplog.records) == 1


def test_strict_and_soft_together_detect_once(world, monkeypatch):
    captions, images = world
    memory = BatchMemory(detect)
    monkeypatch.setattr(shapes, "memory", memory)
    rewards = RewardSet([Reward("strict", shapes_strict), Reward("soft", shapes_soft, weight=0.5)])
    columns = {"images": images, "prompt": captions}
    first = rewards.compute(columns, len(captions))
    assert memory.calls == 1
    monkeypatch.setattr(shapes, "memory", lambda images: detect(to_uint8(images)))
    uncached = rewards.compute(columns, len(captions))
    assert all(torch.equal(first[n], uncached[n]) for n in first)


def test_memory_goes_by_content_is_bounded_and_serves_threads():
    calls = []

    def slow(pixels):
        calls.append(pixels)
        time.sleep(0.02)  # long enough for the other threads to come asking
        return pixels.sum()

    memory = BatchMemory(slow, size=2)
    images = torch.rand(4, 3, 8, 8)
    threads = [threading.Thread(target=memory, args=(images.clone(),)) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(calls) == 1
    images[0, 0, 0, 0] = 1 - images[0, 0, 0, 0].round()  # in place: identity alone would return the old answer
    assert memory(images) == to_uint8(images).sum()
    assert len(calls) == 2
    memory(torch.zeros(1, 3, 8, 8)), memory(torch.zeros(1, 3, 4, 16)), memory(images)
    assert len(calls) == 5  # the same bytes in another shape are another batch; the oldest was dropped
