"""GenEval's judgement on hand-made detections, detectors on hand-made logits, and the whole on tiny random checkpoints."""

import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from rlflow.envs.captions import geneval as prompts
from rlflow.rewards.networks.detect import Found, Mask2Former, Owl, keep, load_detector, overlap
from rlflow.rewards.networks.geneval import ColorJudge, GenEval, relations, shares
from rlflow.rewards.networks.hub import OnDevice, Source


def at(x: float, y: float, size: float = 10.0, score: float = 0.95) -> Found:
    return Found((x - size / 2, y - size / 2, x + size / 2, y + size / 2), score)


def color_by_score(name: str, things: Any) -> list[str]:
    """Hand-made colours: an object's confidence says which."""
    return ["red" if thing.score > 0.94 else "blue" for thing in things]


def strict(row: dict[str, Any], found: dict[str, list[Found]]) -> bool:
    return all(s == 1 for s in shares(row["include"], row["exclude"], found, color_by_score))


def row_of(kind: str, **wanted: str) -> dict[str, Any]:
    return next(r for r in prompts.rows(kind, False) if all(v in r["prompt"] for v in wanted.values()))


class TestJudgement:
    def test_objects_and_counts(self) -> None:
        two = {"include": [{"class": "cat", "count": 1}, {"class": "bus", "count": 1}], "exclude": []}
        assert strict(two, {"cat": [at(0, 0)], "bus": [at(9, 9)] * 3, "dog": [at(1, 1)]})
        assert not strict(two, {"cat": [at(0, 0)]})
        three = row_of("counting", number="three")
        (name,) = {c["class"] for c in three["include"]}
        for number in range(6):
            assert strict(three, {name: [at(20 * i, 0) for i in range(number)]}) == (number == 3)

    def test_colours_belong_to_the_most_certain_objects(self) -> None:
        red = {"include": [{"class": "cat", "count": 1, "color": "red"}], "exclude": []}
        assert strict(red, {"cat": [at(0, 0, score=0.95), at(0, 0, score=0.9)]})
        assert not strict(red, {"cat": [at(0, 0, score=0.9)]})
        both = {"include": [*red["include"], {"class": "bus", "count": 1, "color": "blue"}], "exclude": []}
        assert strict(both, {"cat": [at(0, 0)], "bus": [at(5, 5, score=0.5)]})
        assert not strict(both, {"cat": [at(0, 0, score=0.5)], "bus": [at(5, 5)]}), "colours the other way round"

    @pytest.mark.parametrize("relation", list(prompts.OPPOSITE))
    def test_positions(self, relation: str) -> None:
        """The row says "a <relation> b"; image coordinates grow to the right and downwards."""
        row = {
            "include": [{"class": "b", "count": 1}, {"class": "a", "count": 1, "position": [relation, 0]}],
            "exclude": [],
        }
        side = {"left of": (-30, 0), "right of": (30, 0), "above": (0, -30), "below": (0, 30)}
        for name, place in side.items():
            assert strict(row, {"a": [at(*place)], "b": [at(0, 0)]}) == (name == relation)
        assert not strict(row, {"a": [at(*side[relation])]}), "nothing to stand beside"
        assert not strict(row, {"a": [at(1, 1)], "b": [at(0, 0)]}), "on top of each other"

    def test_a_relation_turns_round_with_its_objects(self) -> None:
        rng = random.Random(0)
        seen = set()
        for _ in range(200):
            a, b = (at(rng.uniform(0, 99), rng.uniform(0, 99), rng.uniform(1, 40)) for _ in range(2))
            assert relations(b, a) == {prompts.OPPOSITE[r] for r in relations(a, b)}
            moved = [Found((f.box[0] + 7, f.box[1] - 3, f.box[2] + 7, f.box[3] - 3), 1.0) for f in (a, b)]
            assert relations(*moved) == relations(a, b)
            seen |= {len(relations(a, b))}
        assert seen == {0, 1, 2}

    def test_shares_are_all_one_exactly_where_the_picture_is_right(self) -> None:
        """And a picture that is nearer is paid more."""
        three = row_of("counting", number="three")
        (name,) = {c["class"] for c in three["include"]}
        paid = [
            sum(shares(three["include"], three["exclude"], {name: [at(0, 0)] * n}, color_by_score)) for n in range(6)
        ]
        assert paid == sorted(paid[:4]) + sorted(paid[4:], reverse=True)
        assert paid[3] == 2 > max(paid[:3] + paid[4:])
        red = [{"class": "cat", "count": 2, "color": "red"}]
        one_red = {"cat": [at(0, 0, score=0.95), at(0, 0, score=0.5)]}
        assert shares(red, [], one_red, color_by_score) == [0.75]


class TestKeep:
    def test_the_most_certain_are_kept_and_doubles_dropped(self) -> None:
        found = [at(0, 0, score=0.5), at(1, 0, score=0.9), at(50, 0, score=0.7), at(90, 0, score=0.2)]
        assert [f.score for f in keep(found, 0.3, 1.0)] == [0.9, 0.7, 0.5]
        assert [f.score for f in keep(found, 0.3, 0.5)] == [0.9, 0.7]
        assert len(keep([at(0, 0)] * 30, 0.3, 1.0)) == 16
        assert overlap(at(0, 0), at(0, 0)) == 1
        assert overlap(at(0, 0), at(5, 0)) == pytest.approx(1 / 3)
        assert overlap(at(0, 0), at(50, 0)) == 0


class Fake(torch.nn.Module):
    """A network that answers as it is told; notes what it was given."""

    def __init__(self, answer: Any, config: Any = None) -> None:
        super().__init__()
        self.answer, self.config, self.given = answer, config, {}

    def forward(self, **given: Tensor) -> Any:
        self.given = given
        return self.answer(**given)


PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
LABELS = {0: "cat", 1: "mouse", 2: "bus"}


@pytest.mark.parametrize(("height", "width"), [(96, 96), (60, 100), (130, 50)])
def test_masks_come_back_in_the_pictures_own_pixels(height: int, width: int) -> None:
    """Logits live on a quarter of the padded picture; the box is where the object is, padding or not."""
    box = (0.25, 0.5, 0.5, 0.75)  # of width and height

    def answer(pixel_values: Tensor, pixel_mask: Tensor) -> Any:
        h, w = pixel_values.shape[-2] // 4, pixel_values.shape[-1] // 4
        inner_h, inner_w = int(pixel_mask[0, :, 0].sum()) / 4, int(pixel_mask[0, 0].sum()) / 4
        masks = torch.full((1, 3, h, w), -9.0)
        masks[
            0, 0, round(box[1] * inner_h) : round(box[3] * inner_h), round(box[0] * inner_w) : round(box[2] * inner_w)
        ] = 9
        masks[0, 1] = 9.0  # all of it
        classes = torch.tensor([[[0.0, 5.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]]])
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)

    network = Fake(answer)
    detector = Mask2Former(OnDevice(network, "cpu"), LABELS, PIXELS, side=128)
    assert detector.knows("computer mouse")
    assert not detector.knows("mouse")
    found = detector(np.zeros((height, width, 3), np.uint8), ["computer mouse", "bus"])
    assert found["bus"] == []
    (thing,) = found["computer mouse"]
    wanted = [box[0] * width, box[1] * height, box[2] * width, box[3] * height]
    assert np.abs(np.array(thing.box) - wanted).max() <= 0.04 * max(height, width)
    assert thing.score == pytest.approx(float(torch.tensor([0.0, 5, 0, 0]).softmax(0)[1]), abs=0.1)
    assert thing.mask is not None
    assert thing.mask.shape == (height, width)
    shape = network.given["pixel_values"].shape[-2:]
    assert all(side % 32 == 0 for side in shape)
    (whole,) = detector(np.zeros((height, width, 3), np.uint8), ["cat"])["cat"]
    assert whole.box == (0, 0, width, height), "what covers the picture ends where the picture ends"


def test_owl_answers_in_pixels_of_the_picture_and_by_the_likeliest_name() -> None:
    def answer(pixel_values: Tensor, **_: Tensor) -> Any:
        logits = torch.tensor([[[3.0, 1.0], [-5.0, 2.0], [-5.0, -5.0]]])
        boxes = torch.tensor([[[0.25, 0.25, 0.1, 0.2], [0.5, 0.1, 0.2, 0.2], [0.5, 0.5, 1.0, 1.0]]])
        return SimpleNamespace(logits=logits, pred_boxes=boxes)

    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=32), text_config=SimpleNamespace(max_position_embeddings=16)
    )
    said: list[str] = []

    def tokenizer(texts: list[str], **_: Any) -> dict[str, Tensor]:
        said.extend(texts)
        return {"input_ids": torch.zeros(len(texts), 16), "attention_mask": torch.ones(len(texts), 16)}

    owl = Owl(OnDevice(Fake(answer, config), "cpu"), tokenizer, PIXELS)
    found = owl(np.zeros((50, 100, 3), np.uint8), ["cat", "bus"])
    assert said == ["a photo of a cat", "a photo of a bus"]
    assert [f.box for f in found["cat"]] == [pytest.approx((20, 15, 30, 35))]
    assert [f.box for f in found["bus"]] == [pytest.approx((40, 0, 60, 20))]


class Palette:
    """Stands for CLIP: a picture is its mean colour, a text the colour it names."""

    RGB = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1), "black": (-1, -1, -1)}

    def texts(self, texts: list[str]) -> Tensor:
        named = [next((rgb for word, rgb in self.RGB.items() if word in t.split("-")[0]), (-1, 1, -1)) for t in texts]
        return torch.tensor(named).float()

    def pictures(self, pictures: list[np.ndarray]) -> Tensor:
        return torch.stack([torch.from_numpy(p).float().mean((0, 1)) / 255 for p in pictures])


def test_the_colour_is_the_objects_and_not_what_surrounds_it() -> None:
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[..., 1] = 255
    mask = np.zeros((20, 20), bool)
    mask[8:12, 8:12] = True
    pixels[mask] = (255, 0, 0)
    judge: Any = ColorJudge(Palette())  # type: ignore[arg-type]
    wide = (4.0, 4.0, 16.0, 16.0)
    assert judge(pixels, "cat", [Found((8, 8, 12, 12), 0.9), Found(wide, 0.9)]) == ["red", "green"]
    with_mask = Found((8.0, 8.0, 12.0, 12.0), 0.9, mask)
    around = Found(wide, 0.9, ~mask)
    assert judge(pixels, "cat", [with_mask, around]) == ["red", "green"]
    inside = crop_of(pixels, Found(wide, 0.9, mask))
    assert (inside == [153, 153, 153]).all(-1).sum() == 12 * 12 - 16
    assert crop_of(pixels, Found((19.6, 19.6, 20.0, 20.0), 0.9)).shape == (1, 1, 3)


def crop_of(pixels: np.ndarray, thing: Found) -> np.ndarray:
    from rlflow.rewards.networks.geneval import crop

    return crop(pixels, thing)


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mask2Former of three classes."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    folder = tmp_path_factory.mktemp("detector")
    stages = [f"stage{i}" for i in range(1, 5)]
    sizes = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 2}
    backbone = SwinConfig(image_size=64, patch_size=4, out_features=stages, **sizes)
    small = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 2}
    small |= {"encoder_layers": 1, "decoder_layers": 2, "dim_feedforward": 32, "encoder_feedforward_dim": 32}
    labels = {"id2label": LABELS, "label2id": {n: i for i, n in LABELS.items()}}
    config = Mask2FormerConfig(backbone_config=backbone, num_queries=6, **small, **labels)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return folder


def test_the_whole_runs_on_tiny_checkpoints(
    detector_folder: Path, clip_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Random networks see nothing certain, so nothing is right; a class nobody knows has no score, said once."""
    reward = GenEval(str(detector_folder), str(clip_folder), side=64, soft=True)
    rows = [
        {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]},
        {"tag": "colors", "include": [{"class": "computer mouse", "count": 1, "color": "red"}], "exclude": []},
        *[{"tag": "single_object", "include": [{"class": "zebra", "count": 1}], "exclude": []}] * 2,
    ]
    columns = {name: [row[name] for row in rows] for name in ("tag", "include", "exclude")}
    scores = reward(torch.rand(4, 3, 48, 64), **columns)
    assert scores.isnan().tolist() == [False, False, True, True]
    assert ((scores[:2] >= 0) & (scores[:2] <= 1)).all()
    assert caplog.text.count("'zebra', which the detector does not know") == 1


@pytest.fixture(scope="module")
def owl_folder(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    """A random OWLv2 of 16 patches, with CLIP's tokenizer."""
    from transformers import AutoTokenizer, Owlv2Config, Owlv2ForObjectDetection

    folder = tmp_path_factory.mktemp("owl")
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    tokenizer.save_pretrained(folder)
    tower = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = tower | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = tower | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=24))
    for parameter in model.parameters():  # the usual start is sure of everything, in boxes of no size
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return folder


def found_by_the_library(folder: Path, pixels: np.ndarray, names: list[str]) -> dict[str, Tensor]:
    """Scores, labels and boxes of a square picture of the detector's own size."""
    import transformers

    model = transformers.Owlv2ForObjectDetection.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer([f"a photo of a {name}" for name in names], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1, **tokens)
    sizes = torch.tensor([pixels.shape[:2]])
    return transformers.Owlv2ImageProcessor().post_process_object_detection(out, Owl.threshold, sizes)[0]


def test_an_owl_of_a_folder_finds_what_the_library_finds(owl_folder: Path, clip_folder: Path) -> None:
    """And the reward counts it: right with as many as there are, wrong with one more."""
    reward = GenEval(str(owl_folder), str(clip_folder))
    assert isinstance(reward.detector, Owl)
    assert (reward.threshold, reward.counting_threshold, reward.max_overlap) == (0.2, 0.2, 0.5)
    pixels, names = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), ["kite", "zebra"]
    found, right = reward.detector(pixels, names), found_by_the_library(owl_folder, pixels, names)
    for i, name in enumerate(names):
        order = right["scores"].argsort(descending=True)
        order = order[right["labels"][order] == i]
        assert len(order) > 0
        assert [f.score for f in found[name]] == pytest.approx(right["scores"][order].tolist(), abs=1e-5)
        boxes = torch.tensor([f.box for f in found[name]])
        torch.testing.assert_close(boxes, right["boxes"][order], rtol=0, atol=1e-3)
    number = len(keep(reward.detector(pixels, ["zebra"])["zebra"], 0.2, 0.5))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    for asked, score in ((number, 1.0), (number + 1, 0.0)):
        clauses = {"include": [[{"class": "zebra", "count": asked}]], "exclude": [[]]}
        assert reward(image, tag=["counting"], **clauses).tolist() == [score]


def test_counting_asks_for_more_certainty_than_the_rest() -> None:
    class OneCat:
        def knows(self, name: str) -> bool:
            return True

        def __call__(self, pixels: Any, names: Any) -> dict[str, list[Found]]:
            return {"cat": [at(0, 0, score=0.5)]}

    reward = GenEval.__new__(GenEval)
    reward.detector, reward.soft, reward.max_overlap = OneCat(), False, 1.0
    reward.threshold, reward.counting_threshold = 0.3, 0.9
    cat = [{"class": "cat", "count": 1}]
    scores = [reward._one(np.zeros((4, 4, 3), np.uint8), tag, cat, []) for tag in ("single_object", "counting")]
    assert scores == [1.0, 0.0]


def test_a_detector_of_another_kind_is_refused(clip_folder: Path, detector_folder: Path) -> None:
    with pytest.raises(ValueError, match="is a clip: give a mask2former of COCO instances, or an owlv2"):
        load_detector(Source(str(clip_folder), "detector"), "cpu", False, "float32", 800)
    with pytest.raises(ValueError, match=r"thresholds below 0\.3 find nothing more"):
        GenEval(str(detector_folder), str(clip_folder), threshold=0.1)


def test_the_judgement_reads_every_prompt_of_ours() -> None:
    """A picture that holds exactly what a row asks for, where it asks for it, is right; without its first object not."""
    for kind, held in itertools.product(prompts.KINDS, (False, True)):
        for row in prompts.rows(kind, held)[::17]:
            found, colors = {}, {}
            for i, clause in enumerate(row["include"]):
                side = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
                x, y = side[clause["position"][0]] if "position" in clause else (0, 0)
                found[clause["class"]] = [
                    at(300 * x + 20 * n, 300 * y + 900 * i * (not x and not y)) for n in range(clause["count"])
                ]
                colors[clause["class"]] = clause.get("color")

            def colors_of(name: str, things: Any) -> list[str]:
                return [colors[name]] * len(things)  # noqa: B023 - used at once

            assert all(s == 1 for s in shares(row["include"], row["exclude"], found, colors_of)), row
            found.pop(row["include"][0]["class"])
            assert not all(s == 1 for s in shares(row["include"], row["exclude"], found, colors_of)), row
