"""The scene world: captions and scenes are one to one, the split is by meaning, drawings are true."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from rlflow.envs.captions.scenes import (
    COLORS,
    KINDS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    VOCAB,
    Scene,
    Thing,
    all_scenes,
    caption,
    draw_captions,
    heldout_captions,
    is_heldout,
    parse,
    render,
    train_captions,
)
from rlflow.rewards.shapes import shapes_strict

SIDE = 72 + 270 * 5


def other_wording(scene: Scene) -> Scene:
    """The same pair or relation named in the other order."""
    return Scene(scene.things[::-1], relation=OPPOSITE[scene.relation] if scene.relation else None)


def test_captions_and_scenes_are_one_to_one():
    scenes = all_scenes()
    assert len({caption(scene) for scene in scenes}) == len(scenes) == SIDE
    assert [parse(caption(scene)) for scene in scenes] == scenes


def test_captions_read_as_english():
    assert parse("three red circles") == Scene((Thing("red", "circle"),), count=3)
    assert parse("One White Square") == Scene((Thing("white", "square"),))
    pair = (Thing("red", "circle"), Thing("blue", "square"))
    assert parse("a red circle and a blue square") == Scene(pair)
    assert parse("a red  circle left of a blue square") == Scene(pair, relation="left of")


@pytest.mark.parametrize(
    "text", ["", "five red circles", "a red circle", "a red dog and a blue square", "three red circle"]
)
def test_anything_else_is_refused_with_examples(text):
    with pytest.raises(ValueError, match="a red circle left of a blue square"):
        parse(text)


def test_every_caption_has_its_own_words_within_eight():
    tokens = [tuple(caption(scene).split()) for scene in all_scenes()]
    assert len(set(tokens)) == len(tokens)
    assert max(map(len, tokens)) <= 8
    assert set().union(*tokens) == set(VOCAB)


def test_split_covers_everything_once_and_holds_out_a_fifth_of_each_kind():
    train, heldout = set(train_captions()), set(heldout_captions())
    assert not train & heldout
    assert len(train) + len(heldout) == SIDE
    for kind in KINDS:
        share = len(heldout_captions([kind])) / (len(heldout_captions([kind])) + len(train_captions([kind])))
        assert share == pytest.approx(0.2, abs=0.03), kind


def test_split_is_by_meaning():
    two = [scene for scene in all_scenes() if scene.kind != "count"]
    assert all(is_heldout(scene) == is_heldout(other_wording(scene)) for scene in two)
    assert all(scene.canonical == other_wording(scene).canonical for scene in two)
    assert any(is_heldout(scene) != is_heldout(Scene(scene.things[::-1], relation=scene.relation)) for scene in two)


def test_every_colour_shape_and_number_is_held_out_somewhere():
    counts = [parse(text) for text in heldout_captions(["count"])]
    assert {s.count for s in counts} == {1, 2, 3, 4}
    assert {s.things[0].color for s in counts} == set(COLORS)
    assert {s.things[0].shape for s in counts} == set(SHAPES)


FROZEN = "c186c45149dad30e"


def test_split_never_changes():
    """Published figures are about exactly these captions: a new hash would make them unreadable."""
    digest = hashlib.sha256("\n".join(heldout_captions()).encode()).hexdigest()
    assert digest.startswith(FROZEN)


def test_drawn_captions_stay_on_their_side_and_follow_the_mix():
    rng = np.random.default_rng(0)
    drawn = draw_captions(rng, 600, mix=(0.5, 0.5, 0.0))
    assert set(drawn) <= set(train_captions())
    assert set(draw_captions(rng, 200, heldout=True)) <= set(heldout_captions())
    kinds = [parse(text).kind for text in drawn]
    assert kinds.count("count") == pytest.approx(300, abs=60)
    assert kinds.count("relation") == 0


def test_drawing_is_a_function_of_the_generator():
    scene = parse("four white triangles")
    first, again, other = (render(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


@pytest.mark.parametrize("size", [32, 48])
def test_drawing_has_its_shape_and_range(size):
    image = render(parse("two blue squares"), np.random.default_rng(0), size)
    assert image.shape == (3, size, size)
    assert image.dtype == np.float32
    assert 0 <= image.min() < image.max() <= 1


def test_true_drawings_satisfy_the_verifier_and_others_do_not(tensor_images):
    images, captions = tensor_images
    assert shapes_strict(images, captions).mean() >= 0.97
    assert shapes_strict(images.roll(1, 0), captions).mean() < 0.05


@pytest.fixture(scope="module")
def tensor_images():
    """600 drawings, 200 of each kind, and their captions."""
    import torch

    rng = np.random.default_rng(0)
    captions = [t for i in range(3) for t in draw_captions(rng, 200, mix=np.eye(3)[i])]
    images = np.stack([render(parse(text), rng) for text in captions])
    order = rng.permutation(len(captions))
    return torch.from_numpy(images[order]), [captions[i] for i in order]


def test_objects_lie_inside_and_apart():
    """No object is cut by the border, and four of them leave four separate bright regions."""
    from scipy import ndimage

    rng = np.random.default_rng(0)
    for text in ("four red squares", "four green triangles", "four yellow circles"):
        for _ in range(50):
            bright = render(parse(text), rng).max(0)
            edge = np.concatenate([bright[0], bright[-1], bright[:, 0], bright[:, -1]])
            assert edge.max() < 0.3  # the tip of a triangle's base may graze it
            assert ndimage.label(bright > 0.3)[1] == 4


@pytest.mark.parametrize("relation", RELATIONS)
def test_relation_holds_between_centres(relation):
    rng = np.random.default_rng(0)
    scene = replace(parse("a red square and a green square"), relation=relation)
    for _ in range(50):
        image = render(scene, rng)
        red, green = image[0] > 0.6, image[1] > 0.5
        dy, dx = (np.argwhere(green).mean(0) - np.argwhere(red).mean(0)).tolist()
        along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
        assert abs(along) > abs(across)
        assert (along > 0) == (relation in ("left of", "above"))
