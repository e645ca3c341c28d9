"""A run folder keeps what it was started from: it goes on from anywhere, and notices what was replaced."""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import rlflow as rf
from rlflow.cli import main
from rlflow.comparison.compare import compare
from rlflow.deploy.runs import evaluate
from rlflow.files import read_tensors, save_tensors
from rlflow.models.io import load_field, save_field
from rlflow.report.metrics_file import read_metrics
from rlflow.report.record import RunRecord
from rlflow.rl.optim import NonFiniteError
from rlflow.train.checkpoint import STATE, Checkpoints
from rlflow.train.trainer import Trainer

Make = Callable[..., Trainer]
WORDS = [
    f"{n} {colour} {shape}s" for n in ("two", "three") for colour in ("red", "blue") for shape in ("circle", "square")
]
WORDS += ["a red circle", "a blue square", "a green circle", "a red square"]


@pytest.fixture
def run(tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of prompts named relative to where it was started; the command now stands elsewhere."""
    (tmp_path / "start").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "start")
    Path("prompts.txt").write_text("\n".join(WORDS))
    trainer(Path("run"), "env.prompts=prompts.txt").fit()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "start" / "run"


def resumed(run: Path, **more: object) -> Trainer:
    """The run as its own config.yaml says, with one iteration more."""
    overrides = ["train.iterations=3"]
    return Trainer(str(run / "config.yaml"), run, overrides=overrides, resume="last", quiet=True, **more)


def test_a_run_is_resumed_evaluated_and_sampled_from_any_folder(run: Path) -> None:
    before = evaluate(run)
    assert evaluate(run / "model", num=6) == pytest.approx({**before, "base_distance": 0.0})
    (run.parent / "prompts.txt").unlink()
    assert evaluate(run) == before
    assert evaluate(run / "model", num=6) == pytest.approx({**before, "base_distance": 0.0})
    assert rf.sample(rf.load(run), ["a red circle"]).shape[0] == 1
    resumed(run).fit()
    assert [row["iteration"] for row in read_metrics(run) if row["kind"] == "eval"] == [0, 2, 3]
    assert RunRecord.read(run).change("eval/heldout/brightness").reason is None
    assert yaml.safe_load((run / "config.yaml").read_text())["env"]["prompts"] == str(run.parent / "prompts.txt")


def test_a_replaced_prompt_file_is_announced_and_not_used(run: Path) -> None:
    (run.parent / "prompts.txt").write_text("\n".join(WORDS[::-1]).replace("red", "green"))
    with pytest.warns(
        UserWarning, match=r"env\.prompts: .*prompts\.txt is not what it was when the run began; .*own copy"
    ):
        resumed(run).fit()
    change = RunRecord.read(run).change("eval/heldout/brightness")
    assert (change.reason, change.num_prompts) == (None, 2)


def test_what_was_not_kept_must_be_as_it_was(tmp_path: Path, trainer: Make, scenes_field: str) -> None:
    """The network a run began with is its reference: another one of that name is refused."""
    field = tmp_path / "field"
    shutil.copytree(scenes_field, field)
    run, given = tmp_path / "run", f"policy.field={field}"
    trainer(run, given).fit()
    tensors = read_tensors(field / "model.safetensors")
    save_tensors({name: value * 1.01 for name, value in tensors.items()}, field / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"^refusing to resume, put back .*: policy\.field: .*field is not what it was"
    ):
        trainer(run, given, resume="last")
    with pytest.warns(UserWarning, match=r"policy\.field: .* is not what it was"):
        evaluate(run, num=2)
    shutil.rmtree(field)
    with pytest.raises(ValueError, match=r"policy\.field: .*field is gone since the run began"):
        trainer(run, given, resume="last")
    shutil.copytree(scenes_field, field)
    trainer(run, given, "train.iterations=3", resume="last").fit()


def test_a_run_of_an_earlier_version_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, no sums, no notes, no keys, no lock: as long as it is resumed where it was started."""
    monkeypatch.chdir(run.parent)
    shutil.rmtree(run / "inputs")
    (run / ".lock").unlink()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(run.parent / "prompts.txt"), "prompts.txt"))
    for path in Checkpoints(run).all():
        head = json.loads((path / STATE).read_text())
        (path / STATE).write_text(json.dumps({k: head[k] for k in ("iteration", "score", "state")}))
    for path in (run / "samples").glob("eval_*.safetensors"):
        save_tensors({k: v for k, v in read_tensors(path).items() if k != "key"}, path)
    assert evaluate(run)
    resumed(run).fit()
    assert RunRecord.read(run).change("eval/heldout/brightness").reason is None
    assert (run / "inputs" / "env.prompts.txt").read_text() == "\n".join(WORDS)


def test_runs_of_equal_prompts_are_paired_and_others_are_not(tmp_path: Path, trainer: Make) -> None:
    """Whatever the files are called; equal numbers of captions are not equal captions."""
    texts = {"a": WORDS, "b": WORDS, "c": [*WORDS[:-1], "a green square"]}
    for name, words in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(words))
        prompts = (f"env.prompts={tmp_path / name}.txt", f"eval.prompts={tmp_path / name}.txt", "eval.num=12")
        trainer(tmp_path / name, "train.iterations=1", *prompts).fit()
    found = compare([tmp_path / name for name in "abc"])["differences"]
    assert [d["reason"] for d in found] == [None, "other samples were evaluated"]
    assert found[1]["metrics"]["eval/heldout/brightness"]["low"] is None


# -- checkpoints of others ------------------------------------------------------------------------


def test_another_runs_checkpoint_is_refused_in_one_line(
    tmp_path: Path, trainer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its config; one of an earlier version that lies alone by the first tensor that does not fit."""
    mine, theirs, alone = tmp_path / "mine", tmp_path / "theirs", tmp_path / "alone"
    trainer(mine).fit()
    wide = load_field(json.loads(json.dumps(yaml.safe_load((mine / "config.yaml").read_text())["policy"]["field"])))
    torch.manual_seed(0)
    wide = type(wide)(**{**wide.args, "width": 32})
    trainer(theirs, f"policy.field={save_field(wide, tmp_path / 'wide')}", "train.seed=7").fit()
    foreign = theirs / "checkpoints" / "000002"
    command = ["train", str(mine / "config.yaml"), "--run", str(mine), "--quiet", "--resume"]
    with pytest.raises(SystemExit):
        main([*command, str(foreign)])
    said = capsys.readouterr().err
    assert "is of another run: policy.field: " in said
    assert "train.seed: 7 -> 0" in said
    shutil.copytree(foreign, alone)
    head = json.loads((alone / STATE).read_text())
    (alone / STATE).write_text(json.dumps({k: head[k] for k in ("iteration", "score", "state")}))
    with pytest.raises(SystemExit):
        main([*command, str(alone)])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"checkpoint {alone} does not fit this run: policy: " in said
    assert "size mismatch for field." in said


@pytest.mark.parametrize("section", ["policy", "weight_sets", "algorithm", "collector", "rng", "trainer", "evaluator"])
def test_a_checkpoint_that_lacks_a_part_says_which(tmp_path: Path, trainer: Make, section: str) -> None:
    run = tmp_path / "run"
    made = trainer(run)
    state = made.state_dict()
    del state[section]
    made.fit()
    path = Checkpoints(tmp_path / "cut", config=made.config.to_dict()).save(0, state)
    with pytest.raises(
        ValueError, match=rf"^checkpoint .*000000 does not fit this run: {section}: '{section}' is missing$"
    ):
        trainer(run, resume=path)


@pytest.mark.parametrize("weights", ["ema", "live"])
def test_weights_of_no_set_are_saved_where_they_are_not_finite(tmp_path: Path, trainer: Make, weights: str) -> None:
    """Neither as the last nor, though their score is the best, as the best checkpoint."""
    run = tmp_path / "run"

    def spoil(made: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        stored = made.policy.weights.sets["ema"] if weights == "ema" else made.policy.weights.parameters()
        with torch.no_grad():
            next(iter(stored.values())).view(-1)[0] = torch.inf

    with pytest.raises(NonFiniteError, match="the weights are not finite after iteration 1"):
        trainer(run, "train.checkpoint_every=1", "eval.every=1", callbacks=[spoil]).fit()
    assert [path.name for path in Checkpoints(run).all()] == ["000000"]


def test_a_network_that_is_not_finite_is_neither_saved_nor_loaded(tmp_path: Path, scenes_field: str) -> None:
    field = load_field(scenes_field)
    name, parameter = next(iter(field.named_parameters()))
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=rf"was not written: '{name}' has values that are not finite"):
        save_field(field, tmp_path / "made")
    shutil.copytree(scenes_field, tmp_path / "field")
    save_tensors(field.state_dict(), tmp_path / "field" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"field/model\.safetensors: '{name}' has values that are not finite"):
        load_field(str(tmp_path / "field"))


# -- who may read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_all_files_of_a_run_are_as_readable_as_the_umask_says(tmp_path: Path, trainer: Make, mask: int) -> None:
    before = os.umask(mask)
    try:
        trainer(tmp_path / "run", "train.iterations=1").fit()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".yaml", ".jsonl"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="becomes another user to be refused")
def test_what_may_not_be_read_is_not_called_missing(scenes_field: str) -> None:
    """safetensors says of a file without permission that there is none."""
    with tempfile.TemporaryDirectory() as folder:  # where others may look, unlike pytest's own
        Path(folder).chmod(0o755)
        path = Path(folder) / "model.safetensors"
        save_tensors({"a": torch.ones(1)}, path)
        path.chmod(0o600)
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match="Permission denied"):
                read_tensors(path)
            with pytest.raises(FileNotFoundError):
                read_tensors(path.with_name("none"))
        finally:
            os.seteuid(0)
