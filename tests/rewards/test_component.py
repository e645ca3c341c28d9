"""Rewards with settings: from a recipe to the call, checked before anything is loaded."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlflow import registry
from rlflow.assembly.evaluator import judged_by
from rlflow.assembly.rewards import make_judges, make_rewards
from rlflow.config.parse import difference, parse
from rlflow.config.values import merge
from rlflow.rewards.base import Reward, RewardSet, column_names
from rlflow.rewards.component import make_reward, reads

BASE = {"train": {"iterations": 1}}


class Halved:
    """A reward that is made once."""

    made = 0

    def __init__(self, by: float, name: str = "x") -> None:
        Halved.made += 1
        self.by = by

    def __call__(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3)) / self.by


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TABLE["reward"], "halved", "halved_for_tests:Halved")
    monkeypatch.setitem(sys.modules, "halved_for_tests", sys.modules[__name__])


def config(**reward: object):  # type: ignore[no-untyped-def]
    return parse(BASE | {"reward": reward})


def test_settings_reach_functions_and_classes(halved: None) -> None:
    images = torch.rand(3, 3, 8, 8)
    made = make_rewards(
        config(
            weights={"jpeg_compressibility": 1.0, "halved": 1.0},
            settings={"jpeg_compressibility": {"quality": 10}, "halved": {"by": 4.0}},
        )
    )
    scores = made.compute({"images": images}, 3)
    rough = make_rewards(config(weights={"jpeg_compressibility": 1.0})).compute({"images": images}, 3)
    assert (scores["jpeg_compressibility"] > rough["jpeg_compressibility"]).all()
    assert torch.allclose(scores["halved"], images.mean((1, 2, 3)) / 4)
    assert made.rewards[1].columns == ("images",)


def test_one_component_twice_under_names_of_ones_own(halved: None) -> None:
    settings = {"a": {"name": "halved", "by": 2.0}, "b": {"name": "halved", "by": 8.0}}
    made = make_rewards(config(weights={"a": 1.0, "b": 1.0}, settings=settings))
    scores = made.compute({"images": torch.ones(1, 3, 2, 2)}, 1)
    assert (float(scores["a"]), float(scores["b"])) == (0.5, 0.125)


def test_judges_have_the_same_settings_and_a_checkpoint_remembers_them(halved: None) -> None:
    values = BASE | {
        "reward": {"weights": {"redness": 1.0, "a": 1.0}, "settings": {"a": {"name": "halved", "by": 2.0}}},
        "eval": {"metrics": {"shown": "a"}},
    }
    values["reward"]["settings"]["redness"] = {}  # type: ignore[index]
    c = parse(values)
    assert float(make_judges(c).compute({"images": torch.ones(1, 3, 2, 2)}, 1)["shown"]) == 0.5
    said = judged_by(c)
    assert said["reward"] == {"settings": {"a": {"name": "halved", "by": 2.0}}}, "only of what judges"
    parse(merge(BASE, said))


@pytest.mark.parametrize(
    ("weights", "settings", "message"),
    [
        ({"halved": 1.0}, {"halved": {}}, r"^reward\.settings\.halved\.by: halved needs this setting$"),
        ({"halved": 1.0}, {"halved": {"by": "2"}}, r"^reward\.settings\.halved\.by: Input should be a valid number"),
        ({"halved": 1.0}, {"halved": {"bye": 2.0}}, r"^reward\.settings\.halved\.bye: .*did you mean 'by'\?$"),
        ({"redness": 1.0}, {"redness": {"images": 1}}, r"^reward\.settings\.redness\.images: redness has no such"),
        ({"redness": 1.0}, {"rednes": {}}, r"^reward\.settings\.rednes: .* no such reward; did you mean 'redness'\?$"),
        ({"rednes": 1.0}, {}, r"^reward\.weights: unknown reward 'rednes'; did you mean 'redness'\?$"),
        ({"a": 1.0}, {"a": {"name": "rednes"}}, r"^reward\.settings\.a: unknown reward 'rednes'"),
        ({"a": 1.0}, {"a": {"name": "m:f"}}, r"^reward\.settings\.a: .*--trust-code"),
    ],
)
def test_wrong_settings_are_said_with_their_path(
    halved: None, weights: dict[str, float], settings: dict[str, dict[str, object]], message: str
) -> None:
    before = Halved.made
    with pytest.raises(ValueError, match=message):
        config(weights=weights, settings=settings)
    assert Halved.made == before, "checking a recipe makes nothing"


def test_a_constructor_says_its_path() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"^reward\.settings\.clip_score\.model: '/absent': no such folder"):
        make_reward("clip_score", {"clip_score": {"model": "/absent"}})


def test_a_server_may_move_between_a_run_and_its_resume() -> None:
    old = {"reward": {"settings": {"a": {"url": "x", "device": "cpu", "model": "m"}}}}
    new = {"reward": {"settings": {"a": {"url": "y", "device": "cuda", "model": "n"}}}}
    assert difference(old, new) == ["reward.settings.a.model: 'm' -> 'n'"]


def test_what_an_instance_reads_may_be_its_own_setting() -> None:
    class Any:
        def __init__(self, columns: list[str]) -> None:
            self.__signature__ = reads(columns)

        def __call__(self, **columns: object) -> list[float]:
            return [float(len(columns))]

    assert column_names(Any(["images", "text"])) == ("images", "text")
    made = RewardSet([Reward("r", Any(["prompt"]))])
    assert float(made.compute({"prompt": ["a"], "text": ["b"]}, 1)["r"]) == 1.0


def test_the_tiny_clip_trains_by_name(clip_folder: Path, pictures: Tensor) -> None:
    c = config(weights={"clip_score": 1.0}, settings={"clip_score": {"model": str(clip_folder)}})
    scores = make_rewards(c).compute({"images": pictures, "prompt": ["a"] * 6, "group": torch.zeros(6)}, 6)
    assert scores["clip_score"].isfinite().all()
