"""The command: what a user gets wrong is one line and exit code 2, and what it prints for machines can be read."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rlflow import cli
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


TOY = ("policy.field=toy", "policy.num_steps=4", "policy.precision=float32", "env.name=toy_reach", "env.num_groups=2")
TOY_RUN = ("t2i_flow_grpo", *TOY, "env.group_size=4", "train.minutes=", "train.iterations=2", "train.tensorboard=false")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """toy(*words): train a toy for two iterations in tmp_path/run."""
    monkeypatch.setattr("rlflow.train.report.write_report", lambda run: Path(run))
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
