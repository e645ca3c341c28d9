"""The command: what a user gets wrong is one line and exit code 2, and what it prints for machines can be read."""

import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlflow import cli, console
from rlflow.config import recipes
from rlflow.evaluation.images import Evaluation
from rlflow.train.trainer import Trainer

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """fails(*words) -> what a command that must end with exit code 2 said last on stderr."""

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


TOY = (
    "policy.field=mlp",
    "reward.weights={}",
    "policy.num_steps=4",
    "policy.precision=float32",
    "env.name=toy_reach",
    "env.num_groups=2",
)
TOY_RUN = (
    "t2i_flow_grpo",
    *TOY,
    "policy.frozen=",
    "env.group_size=4",
    "train.minutes=",
    "train.iterations=2",
    "train.tensorboard=false",
    "train.report=false",
)


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., None]:
    """toy(*words): train a toy for two iterations in tmp_path/run."""
    return lambda *words: cli.main(["train", *TOY_RUN, "--run", str(tmp_path / "run"), "--quiet", *words])


# -- several seeds --------------------------------------------------------------------------------


def begun(run: Path) -> list[str]:
    return sorted(folder.name for folder in run.iterdir())


def test_a_signal_ends_all_seeds(
    tmp_path: Path, toy: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in seed 0 is no order to train seed 1; --resume last goes on with the one and begins the other."""
    real = Trainer._one

    def interrupted(self: Trainer) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one", interrupted)
        toy("--seeds", "0,1")
    assert begun(tmp_path / "run") == ["seed-0"]
    assert "stopped by a signal" in capsys.readouterr().out
    toy("--seeds", "0,1", "--resume", "last")
    assert begun(tmp_path / "run") == ["seed-0", "seed-1"]
    assert capsys.readouterr().out.count("finished: 2 iterations") == 2


def test_seeds_of_a_run_that_never_was_are_not_resumed(tmp_path: Path, fails: Fails) -> None:
    run = ("--run", str(tmp_path / "run"), "--seeds", "0,1", "--resume", "last")
    assert "nothing to resume" in fails("train", *TOY_RUN, *run)


@pytest.mark.parametrize("seeds", ["a,b", "0,", "", "0,0", "0,-1", "1.5"])
def test_seeds_are_read_before_any_is_trained(seeds: str, tmp_path: Path, fails: Fails) -> None:
    assert f"--seeds {seeds!r}" in fails("train", *TOY_RUN, "--run", str(tmp_path / "run"), "--seeds", seeds)
    assert not (tmp_path / "run").exists()


# -- one line in place of a traceback -------------------------------------------------------------


def test_what_is_not_yaml_is_named_with_its_place(tmp_path: Path, fails: Fails) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("about: x\ntrain: {minutes: [}\n")
    for command in ("train", "doctor"):
        assert f"recipe {str(bad)!r} is not YAML in line 2, column 19: " in fails(command, str(bad))
    assert "override 'train.minutes=[' is not YAML in line 1" in fails("train", "t2i_flow_grpo", "train.minutes=[")
    assert f"table {str(bad)!r} is not YAML" in fails("sweep", str(bad), "--run", str(tmp_path))


def test_a_recipe_that_inherits_from_itself_is_named(tmp_path: Path, fails: Fails) -> None:
    for name, base in (("a", "b"), ("b", "sub/../a"), ("self", "self")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    (tmp_path / "sub").mkdir()
    for name in ("a", "self"):
        assert "inherits from itself: " in fails("train", str(tmp_path / f"{name}.yaml"))


def test_a_base_lies_beside_its_recipe(tmp_path: Path) -> None:
    """Wherever the command stands; a name without ending is still a shipped recipe."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "first.yaml").write_text("base: t2i_flow_grpo\ntrain: {seed: 7}\n")
    (tmp_path / "sub/second.yaml").write_text("base: ../first.yaml\n")
    assert recipes.load(str(tmp_path / "sub/second.yaml")).train.seed == 7


@pytest.mark.parametrize("error", [ImportError("needs gymnasium"), FloatingPointError("5 steps"), KeyError("no score")])
def test_errors_a_user_can_mend_are_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, fails: Fails, tmp_path: Path
) -> None:
    """A package that is not installed, a run that diverged; --debug shows where."""

    def broken(run: Path) -> Path:
        raise error

    monkeypatch.setattr("rlflow.report.report.write_report", broken)
    assert fails("report", str(tmp_path)) == f"rlflow: error: {error.args[0]}"
    with pytest.raises(type(error)):
        cli.main(["--debug", "report", str(tmp_path)])


def test_a_toy_is_evaluated_in_episodes_and_makes_no_pictures(
    tmp_path: Path, toy: Callable[..., None], fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    toy()
    run = str(tmp_path / "run")
    cli.main(["eval", run, "--num", "3"])
    assert "3 seeded episodes, deployment sampler" in capsys.readouterr().out
    png, mp4 = str(tmp_path / "x.png"), str(tmp_path / "x.mp4")
    assert "takes no text, it acts in toy_reach" in fails("sample", run, "--prompt", "a red circle", "--out", png)
    assert "name a file that ends in .mp4" in fails("sample", run, "--out", png)
    with pytest.warns(UserWarning, match="ToyReach|ReachSim"):
        assert "x.mp4 was not written: there is no picture" in fails("sample", run, "--out", mp4, "--num", "2")


def test_a_film_of_an_embedded_robot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exactly the episodes asked for, one after the other, where the machine can draw."""
    pytest.importorskip("mujoco")
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    try:
        cli.main(["sample", "hopper", "--out", str(tmp_path / "x.mp4"), "--num", "1", "--seed", "3"])
    except SystemExit:
        pytest.skip("this machine draws no pictures")
    said = capsys.readouterr().out
    length = float(re.search(r"episode 0: return \S+ length (\S+)", said.replace(",", ""))[1])
    frames, _ = ffmpeg.count_frames_and_secs(str(tmp_path / "x.mp4"))
    assert frames == pytest.approx(min(200, length / 5), abs=1)  # 125 steps and 25 frames in a second


def test_samples_are_of_the_checkpoint_asked_for(tmp_path: Path, toy: Callable[..., None], fails: Fails) -> None:
    """Of a run; a folder of weights has but one."""
    toy()
    film = ["--out", str(tmp_path / "x.mp4")]
    assert "99" in fails("sample", str(tmp_path / "run"), *film, "--checkpoint", "99")
    assert "hopper is no run folder: checkpoint and weights" in fails("sample", "hopper", *film, "--weights", "ema")
    words = ["--prompt", "a red circle", "--out", str(tmp_path / "x.png")]
    assert "shapes is no run folder: checkpoint and weights" in fails(
        "sample", "shapes", *words, "--checkpoint", "best"
    )


def test_images_need_a_prompt(fails: Fails) -> None:
    assert "shapes makes images: say of what, with --prompt" in fails("sample", "shapes", "--out", "x.png")
    assert "name a file that ends in .png" in fails("sample", "shapes", "--prompt", "a red circle", "--out", "x.jpeg")


def test_a_pipeline_of_diffusers_shows_its_pictures_and_says_why_it_is_not_judged(
    tmp_path: Path, tiny_pipeline: Callable[..., Path], fails: Fails
) -> None:
    pytest.importorskip("diffusers")
    folder, png = str(tiny_pipeline("sd3")), tmp_path / "x.png"
    cli.main(["sample", folder, "--prompt", "a red circle", "--num", "1", "--steps", "2", "--out", str(png)])
    assert png.stat().st_size > 1000
    assert "is a pipeline, which does not say how it is judged" in fails("eval", folder)


def test_a_mistyped_run_is_no_pipeline_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "no checkpoint 'runs/typo'" in fails("eval", "runs/typo")
    assert "no checkpoint 'runs/typo'" in fails("sample", "runs/typo", "--out", "x.mp4")


@pytest.mark.parametrize("number", ["0", "-1", "two"])
@pytest.mark.parametrize("flag", ["--num", "--steps"])
def test_counts_are_at_least_one(flag: str, number: str, fails: Fails) -> None:
    for command in (["eval", "shapes"], ["sample", "shapes", "--prompt", "a red circle", "--out", "x.png"]):
        assert f"argument {flag}: must be a whole number of at least 1" in fails(*command, f"{flag}={number}")


EMPTY = [
    ("train", "t2i_flow_grpo", "--run="),
    ("train", "t2i_flow_grpo", "--run", " "),
    ("train", "t2i_flow_grpo", "--run", "x", "--resume="),
    ("train", ""),
    ("doctor", ""),
    ("sample", "shapes", "--prompt", "a", "--out="),
    ("sample", "", "--prompt", "a", "--out", "x.png"),
    ("eval", ""),
    ("eval", "shapes", "--checkpoint="),
    ("sweep", "x.yaml", "--run="),
    ("report", ""),
    ("compare", "a", ""),
    ("pretrain", "shapes", "--out="),
]


@pytest.mark.parametrize("words", EMPTY)
def test_no_path_is_empty(
    words: tuple[str, ...], fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--run=$RUN` without RUN would train into the folder where the command stands."""
    monkeypatch.chdir(tmp_path)
    assert "must not be empty" in fails(*words)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"^run: must not be empty"):
        Trainer("t2i_flow_grpo", "")


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "shapes", "--seed=-1"),
        ("sample", "shapes", "--prompt", "a", "--out", "x.png", "--seed", str(2**63)),
        ("serve-reward", "brightness", "--port", "65536"),
        ("serve-reward", "brightness", "--port", "0", "--timeout", "nan"),
        ("serve-reward", "brightness", "--port", "0", "--timeout", "1e-300"),
    ],
)
def test_numbers_of_the_command_line_have_ranges(words: tuple[str, ...], fails: Fails) -> None:
    assert "must be " in fails(*words)


# -- for machines ---------------------------------------------------------------------------------


def test_json_holds_null_for_what_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN and Infinity are not JSON."""
    scores = {"strict": torch.tensor([torch.nan, torch.nan]), "soft": torch.tensor([0.25, 0.75])}
    result = Evaluation(scores, torch.zeros(2, 3, 4, 4), ["a", "b"], torch.arange(2))
    monkeypatch.setattr("rlflow.deploy.runs.evaluator_of", lambda *args, **settings: lambda: result)
    cli.main(["eval", "shapes", "--json"])
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert said == {"samples": 2, "eval/heldout/strict": None, "eval/heldout/soft": 0.5}
    monkeypatch.setattr(
        "rlflow.comparison.report.comparison_values", lambda runs: {"runs": [{"interval": (1.0, math.inf)}]}
    )
    cli.main(["compare", "a", "--json"])
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"runs": [{"interval": [1.0, None]}]}


def test_tables_in_a_pipe_keep_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 160 columns, unless the user says otherwise."""
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console.terminal().width == 160
    monkeypatch.setenv("COLUMNS", "90")
    assert console.terminal().width == 90


def test_a_long_step_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line in ten seconds, and the rest at the pace so far; a short step says nothing."""
    now = 0.0
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now))
    assert list(console.counted(3, "episodes")) == [0, 1, 2]
    for _ in console.counted(5, "episodes"):
        now += 6
    said = ["2 of 5 episodes  12 s, about 18 s left", "4 of 5 episodes  24 s, about 6 s left"]
    assert capsys.readouterr().out.splitlines() == said
