"""Where networks come from: what does not load is named with its setting and its reason, at once; what loads is quiet."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
import transformers
from huggingface_hub import constants

from rlflow.models import hub
from rlflow.rewards.component import make_reward
from rlflow.rewards.networks.clip import ClipScore
from rlflow.rewards.networks.hub import Source, read_weights

PREPROCESSOR = "preprocessor_config.json"
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture
def without(clip_folder: Path, tmp_path: Path) -> Callable[..., str]:
    """without(name, ...) -> a copy of the tiny CLIP's folder that lacks these files."""

    def copy(*names: str) -> str:
        folder = tmp_path / ("clip_" + str(len(list(tmp_path.iterdir()))))
        shutil.copytree(clip_folder, folder)
        for name in names:
            (folder / name).unlink(missing_ok=True)
        return str(folder)

    return copy


@pytest.fixture
def head(tmp_path: Path) -> str:
    torch.save({"weight": torch.ones(1, 32), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    return str(tmp_path / "head.pth")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub at which nobody answers, and a test that does not wait for it; the address."""

    def sleeps(seconds: float) -> None:
        raise AssertionError(f"slept for {seconds} s")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", sleeps)
    hub.unreachable.cache_clear()
    yield constants.ENDPOINT
    hub.unreachable.cache_clear()


NAMED = [
    ("pickscore", "model", {"processor": "CLIP"}),
    ("pickscore", "processor", {"model": "CLIP"}),
    ("clip_score", "model", {}),
    ("image_similarity", "model", {}),
    ("aesthetic", "model", {"head": "HEAD"}),
    ("hps", "checkpoint", {"base": "CLIP"}),
    ("hps", "base", {"checkpoint": "HEAD"}),
    ("geneval", "detector", {"clip": "CLIP"}),
]


def settings(others: dict[str, str], clip: Path, head: str) -> dict[str, str]:
    return {name: {"CLIP": str(clip), "HEAD": head}[value] for name, value in others.items()}


@pytest.mark.parametrize(("reward", "setting", "others"), NAMED)
def test_without_a_network_the_setting_and_the_reason_are_said_at_once(
    reward: str, setting: str, others: dict[str, str], clip_folder: Path, head: str, no_network: str
) -> None:
    given = settings(others, clip_folder, head) | {setting: "owner/name"}
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE=1 keeps to this disk") as error:
        make_reward(reward, {reward: given})
    assert str(error.value).startswith(f"reward.settings.{reward}.{setting}: 'owner/name' is not on this machine and ")
    assert f"there is no network to {no_network}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("reward", "setting", "others"), NAMED)
def test_a_folder_that_lacks_what_it_should_hold_is_named(
    reward: str, setting: str, others: dict[str, str], clip_folder: Path, head: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    given = settings(others, clip_folder, head) | {setting: str(tmp_path / "empty")}
    with pytest.raises(ValueError, match="holds no ") as error:
        make_reward(reward, {reward: given})
    assert str(error.value).startswith(f"reward.settings.{reward}.{setting}: the folder {str(tmp_path / 'empty')!r} ")


def test_a_downloaded_pickscore_without_its_processor_is_told_so(clip_folder: Path) -> None:
    """As after `hf download yuvalkirstain/PickScore_v1`: its processor is another name on the hub."""
    with pytest.raises(ValueError, match=r"^reward\.settings\.pickscore\.processor: 'laion/CLIP-ViT-H-14.*network"):
        make_reward("pickscore", {"pickscore": {"model": str(clip_folder)}})


def test_the_offline_setting_is_the_reason_where_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.unreachable.cache_clear()
    with pytest.raises(ValueError, match=r"^reward\.settings\.clip_score\.model: .*, for HF_HUB_OFFLINE is set:"):
        make_reward("clip_score", {"clip_score": {"model": "owner/name"}})
    hub.unreachable.cache_clear()


def test_what_is_on_this_disk_needs_no_network(
    no_network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--o--n" / "refs").mkdir(parents=True)
    (tmp_path / "models--o--n" / "refs" / "main").write_text("0" * 40)
    (folder := tmp_path / "models--o--n" / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "x.txt").write_text("hello")
    assert Source("o/n", "model").file("x.txt").read_text() == "hello"


def test_a_missing_tokenizer_is_not_replaced_by_an_empty_one(without: Callable[..., str]) -> None:
    """transformers makes one that knows two tokens, with which every prompt is alike."""
    with pytest.raises(ValueError, match=r"model: .*has a tokenizer of \d tokens for a network of 514:"):
        ClipScore(without(*TOKENIZER))
    with pytest.raises(ValueError, match=rf"model: .* holds no {PREPROCESSOR}"):
        ClipScore(without(PREPROCESSOR))


def test_missing_weights_are_not_drawn_at_random(without: Callable[..., str]) -> None:
    folder = without()
    weights = load_file(Path(folder) / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^model: .* lacks weights of a CLIPModel: \['text_projection\.weight'\]"):
        ClipScore(folder)


def test_damaged_files_are_one_line(without: Callable[..., str], tmp_path: Path) -> None:
    folder = without()
    weights = Path(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="^model: the folder .* holds no weights of a CLIPModel that can be loaded"):
        ClipScore(folder)
    (Path(folder) / "config.json").write_text(json.dumps({"model_type": "clip"})[:-3])
    with pytest.raises(ValueError, match="^model: the folder .* that can be loaded"):
        ClipScore(folder)
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).write_bytes(b"abc")
        with pytest.raises(ValueError, match=rf"{name} (cannot be read as weights|is damaged)"):
            read_weights(tmp_path / name)


def test_loading_is_quiet_and_leaves_the_libraries_as_loud_as_they_were(
    without: Callable[..., str], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    log: Any = transformers.utils.logging
    folder = without()
    weights = load_file(Path(folder) / "model.safetensors")
    save_file(weights | {"more": torch.ones(1)}, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    assert before == (logging.WARNING, True)
    ClipScore(folder)
    assert "".join(capfd.readouterr()) == ""
    assert not caplog.records
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before
