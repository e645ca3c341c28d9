"""What a config names on disk: resolved where the command stands, hashed, kept, and looked for again."""

import json
import shutil
from pathlib import Path

import pytest

from rlflow.config import inputs
from rlflow.config.parse import parse
from rlflow.files import WHOLE, digest


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the command stands, with things that a recipe may name."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.txt", "scenes.txt", "head.safetensors", "cpu", "auto"):
        Path(name).write_text("a red circle\n")
    for name in ("judge", "runs/model", "shapes"):
        Path(name).mkdir(parents=True)
        (Path(name) / "config.json").write_text("{}")
    Path("plain").mkdir()
    return tmp_path


def config(**sections: object) -> dict:
    return {"env": {"prompts": "mine.txt"}, **sections}


def test_paths_are_absolute_and_names_stay_names(here: Path) -> None:
    values = {
        "env": {"prompts": "mine.txt", "settings": {"options": {"xml_file": "./mine.txt", "render_mode": "auto"}}},
        "eval": {"prompts": "geneval:absent.jsonl"},
        "policy": {"field": {"name": "pretrained", "checkpoint": "runs/model", "adapter": "owner/name"}},
        "algorithm": {"offline": {"demos": "made_later"}},
        "reward": {
            "settings": {"a": {"name": "pickscore", "model": "judge", "device": "cpu", "head": "head.safetensors"}}
        },
        "about": "mine.txt",
        "train": {"seed": 0},
    }
    found = inputs.absolute(values)
    assert found["env"]["prompts"] == str(here / "mine.txt")
    assert found["env"]["settings"]["options"] == {"xml_file": str(here / "mine.txt"), "render_mode": "auto"}
    assert found["eval"]["prompts"] == f"geneval:{here / 'absent.jsonl'}", "a prompt file is one before it is there"
    assert found["policy"]["field"]["checkpoint"] == str(here / "runs/model")
    assert found["policy"]["field"]["adapter"] == "owner/name", "on the hub"
    assert found["algorithm"]["offline"]["demos"] == str(here / "made_later"), "made where it does not exist"
    reward = found["reward"]["settings"]["a"]
    assert reward == {
        **values["reward"]["settings"]["a"],
        "model": str(here / "judge"),
        "head": str(here / "head.safetensors"),
    }
    assert (found["about"], found["train"]) == ("mine.txt", {"seed": 0})
    assert inputs.absolute(found) == found


@pytest.mark.parametrize("name", ["shapes", "mlp", "plain", "words"])
def test_a_shipped_network_is_not_a_folder_of_its_name(here: Path, name: str) -> None:
    assert inputs.absolute({"policy": {"field": name}}) == {"policy": {"field": name}}


def test_every_config_has_absolute_paths(here: Path) -> None:
    values = config(train={"iterations": 1})
    assert parse(values).env.prompts == str(here / "mine.txt")
    assert values["env"]["prompts"] == "mine.txt"
    assert parse({"env": {"prompts": "scenes:pair"}, "train": {"iterations": 1}}).env.prompts == "scenes:pair"


def test_the_runs_own_copy_is_used_where_the_file_is_gone_or_another(here: Path) -> None:
    run, values = here / "run", inputs.absolute(config(policy={"field": "runs/model"}))
    run.mkdir()
    inputs.keep(run, values)
    assert inputs.at_hand(run, values) == (values, [])
    Path("mine.txt").write_text("a blue square\n")
    (found, (said,)) = inputs.at_hand(run, values)
    assert Path(found["env"]["prompts"]).read_text() == "a red circle\n"
    assert said.startswith(f"env.prompts: {here / 'mine.txt'} is not what it was when the run began; ")
    Path("mine.txt").unlink()
    moved = shutil.move(run, here / "moved")
    found, said = inputs.at_hand(Path(moved), values)
    assert Path(found["env"]["prompts"]).read_text() == "a red circle\n"
    assert said == []
    assert inputs.changed_for_good(Path(moved), values) == []


@pytest.mark.parametrize("gone", [False, True])
def test_what_is_too_large_to_keep_must_stay_as_it_was(here: Path, gone: bool) -> None:
    values = inputs.absolute(config(policy={"field": "runs/model"}))
    inputs.keep(here, values)
    shutil.rmtree("runs/model") if gone else (here / "runs/model/config.json").write_text("{} ")
    (said,) = inputs.changed_for_good(here, values)
    assert said.startswith(f"policy.field: {here / 'runs/model'} {'is gone' if gone else 'is not what it was'}")


def test_what_was_noted_stays_and_points_nowhere_else(here: Path) -> None:
    """A resumed run notes nothing anew; a stranger's note names no file outside the run."""
    run, values = here / "run", inputs.absolute(config())
    run.mkdir()
    inputs.keep(run, values)
    noted = (run / "inputs/inputs.json").read_text()
    Path("mine.txt").write_text("a blue square\n")
    inputs.keep(run, values)
    assert (run / "inputs/inputs.json").read_text() == noted
    (run / "inputs/inputs.json").write_text(noted.replace('"env.prompts.txt"', json.dumps("../../cpu")))
    found, _ = inputs.at_hand(run, values)
    assert found == values
    (run / "inputs/inputs.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"inputs\.json is no table"):
        inputs.at_hand(run, values)
    shutil.rmtree(run / "inputs")
    assert inputs.at_hand(run, values) == (values, []), "runs of earlier versions noted nothing"


def test_a_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    """Not of the place or the time; hidden files, as of a lock, do not count."""
    for name in "ab":
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep/x").write_text("1")
    first = digest(tmp_path / "a")
    (tmp_path / "b/.lock").write_text("?")
    assert digest(tmp_path / "b") == first
    for change in (lambda p: p.write_text("2"), lambda p: p.rename(p.with_name("y")), lambda p: p.unlink()):
        (tmp_path / "b/deep/x").write_text("1")
        change(tmp_path / "b/deep/x")
        assert digest(tmp_path / "b") != first
        (tmp_path / "b/deep/y").unlink(missing_ok=True)


def test_of_a_large_file_its_size_and_pieces_count(tmp_path: Path) -> None:
    """Both ends and what lies between, without reading all of it."""
    path = tmp_path / "weights"
    size = WHOLE + 2**22
    with path.open("wb") as file:
        file.truncate(size)
    sums = {digest(path)}
    for place in (0, size // 2, size - 1):
        with path.open("r+b") as file:
            for start in range(place - place % 2**21, min(size, place - place % 2**21 + 2**21), 4096):
                file.seek(start)
                file.write(b"x")
        sums.add(digest(path))
    with path.open("ab") as file:
        file.write(b"\0")
    assert len(sums | {digest(path)}) == 5
