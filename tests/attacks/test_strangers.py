"""Files of strangers run no code: a name in a recipe, a run folder, a checkpoint or a pipeline imports nothing."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from rlflow.cli import main
from rlflow.config import recipes
from rlflow.models.pretrained.pipeline import adapter_of
from rlflow.registry import validate
from rlflow.train.sweep import plan
from rlflow.trust import UntrustedCodeError

MODULE = "rlflow_tests_stranger"
CODE = """
from pathlib import Path

import gymnasium

(Path(__file__).parent / "ran").touch()
gymnasium.register("rlflow_tests/Stranger-v0", entry_point="gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=4)
"""
ENV = f"{MODULE}:rlflow_tests/Stranger-v0"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a module in it that leaves a mark when it is imported."""
    (tmp_path / f"{MODULE}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop(MODULE, None)


def recipe(here: Path) -> str:
    """A recipe of the stranger's."""
    values = recipes.read("robot_reinflow")
    values["env"] = {"name": "gym", "num_groups": 2, "group_size": 2, "settings": {"env_id": ENV}}
    values |= {"train": {"iterations": 1, "tensorboard": False, "report": False}, "eval": {"num": 2}}
    values["policy"] = values["policy"] | {"field": "mlp"}
    values["algorithm"] = values["algorithm"] | {"num_minibatches": 1, "epochs": 1}
    (here / "theirs.yaml").write_text(yaml.safe_dump(values))
    return "theirs.yaml"


def run_folder(here: Path) -> str:
    """A run of the stranger's."""
    folder = here / "run"
    folder.mkdir()
    shutil.copy(recipe(here), folder / "config.yaml")
    return "run"


def checkpoint(here: Path) -> str:
    """A checkpoint of the stranger's, which says what it is judged by."""
    said = {"env": {"name": "gym", "settings": {"env_id": ENV}}}
    folder = here / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": "mlp", "args": {}, "judged_by": said}))
    return "model"


def table(here: Path) -> str:
    """A sweep of the stranger's."""
    values = {"runs": [{"name": "a", "recipe": recipe(here)}]}
    (here / "table.yaml").write_text(yaml.safe_dump(values))
    return "table.yaml"


@pytest.mark.parametrize(
    ("words", "make"),
    [
        (["train", "{}", "--run", "new", "--quiet"], recipe),
        (["train", "{}/config.yaml", "--run", "run", "--resume", "last"], run_folder),
        (["plan", "{}"], recipe),
        (["doctor", "{}"], recipe),
        (["sweep", "{}", "--run", "sweep"], table),
        (["eval", "{}"], run_folder),
        (["eval", "{}"], checkpoint),
        (["sample", "{}", "--out", "x.mp4"], run_folder),
        (["sample", "{}", "--out", "x.mp4"], checkpoint),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value.__name__,
)
def test_no_command_imports_what_a_file_names(
    here: Path, words: list[str], make: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([word.format(make(here)) if "{}" in word else word for word in words])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "env.settings.env_id: " in said
    assert "pass --trust-code" in said
    assert not (here / "ran").exists()


@pytest.mark.parametrize("text", [ENV, f"{MODULE}: x", f"{MODULE}://x", {"deep": [f"{MODULE}:X"]}])
def test_a_colon_anywhere_in_the_settings_of_an_environment_needs_trust(text: object) -> None:
    """gymnasium.make imports what stands before it, whatever stands behind; a wrapped environment is an option."""
    given = {"name": "gym", "env_id": "Pendulum-v1", "options": {"env_id": text}}
    with pytest.raises(UntrustedCodeError, match=r"^env\.settings\.options: .*--trust-code"):
        validate("env", "env.settings", given, ["num_envs", "gamma"])
    assert validate("env", "env.settings", given, ["num_envs", "gamma"], trust_code=True)["options"]["env_id"] == text


def test_with_trust_the_environments_module_is_found_where_the_command_stands(here: Path) -> None:
    main(["train", recipe(here), "--run", "new", "--quiet", "--trust-code"])
    assert (here / "ran").exists()
    assert (here / "new" / "model").is_dir()


def test_the_runs_of_a_sweep_import_nothing_from_where_it_stands(here: Path) -> None:
    """`python -m` looks there before anywhere else."""
    (here / "argparse.py").write_text("open('ran', 'w').close()")
    (job,) = plan({"runs": [{"name": "a", "recipe": "t2i_cps"}]})
    command = job.command(here)
    subprocess.run([*command[: command.index("train")], "--help"], cwd=here, check=True, stdout=subprocess.DEVNULL)
    assert not (here / "ran").exists()


@pytest.mark.parametrize("how", ["library", "file", "auto", "auto_map", "class"])
def test_a_pipelines_folder_runs_no_code_of_its_own(here: Path, tiny_pipeline: Callable[..., Path], how: str) -> None:
    folder = here / "pipeline"
    shutil.copytree(tiny_pipeline("sd3"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    if how in ("library", "file"):
        index["transformer"] = [MODULE, "Transformer"]
    if how == "auto":
        index["tokenizer"] = ["transformers", "AutoTokenizer"]
    if how == "file":
        shutil.copy(f"{MODULE}.py", folder / "transformer")
    if how == "class":
        index["_class_name"] = [MODULE, "Pipeline"]
    if how == "auto_map":
        path = folder / "tokenizer_3" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": f"a/b--{MODULE}.X"}}))
    (folder / "model_index.json").write_text(json.dumps(index))
    sys.path.append(str(here))
    with pytest.raises(ValueError, match="which rlflow does not run"):
        adapter_of(str(folder))
    assert not (here / "ran").exists()
