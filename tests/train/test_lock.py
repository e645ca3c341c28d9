"""One writer for a run folder: whoever comes second is told who holds it, and a holder that died holds nothing."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlflow.comparison.compare import compare
from rlflow.deploy.runs import evaluate
from rlflow.report.metrics_file import read_metrics
from rlflow.report.report import write_report
from rlflow.train import lock as lock_module
from rlflow.train.lock import RunLock
from rlflow.train.trainer import Trainer

HOLD = """
import sys, time
from pathlib import Path
from rlflow.train.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def held_elsewhere(run: Path) -> subprocess.Popen[str]:
    """A process that holds the folder until it is killed."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_writer_is_told_who_writes_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = held_elsewhere(run)
    try:
        with pytest.raises(BlockingIOError) as refused:
            RunLock(run).acquire()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    said = str(refused.value)
    assert said.startswith(f"{run} is being written by process {holder.pid} on {socket.gethostname()} since 20")
    assert "\n" not in said
    mine = RunLock(run)
    mine.acquire()
    mine.acquire()  # holding it twice is holding it
    with pytest.raises(BlockingIOError, match=r"\(this one\)"):
        RunLock(run).acquire()
    mine.release()
    RunLock(run).acquire()


@pytest.mark.parametrize(
    ("note", "free"),
    [
        ({}, True),
        ({"pid": os.getpid(), "host": socket.gethostname()}, False),
        ({"pid": 2**22 + 1, "host": socket.gethostname()}, True),  # above the largest of a 64-bit kernel
        ({"pid": 1, "host": "elsewhere"}, False),
        ({"host": socket.gethostname()}, True),
    ],
)
def test_without_locks_of_the_file_system_the_note_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: dict, free: bool
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock_module.fcntl, "flock", unsupported)
    (tmp_path / ".lock").write_text(json.dumps(note) if note else "")
    lock = RunLock(tmp_path)
    if not free:
        with pytest.raises(BlockingIOError, match="is being written by process"):
            lock.acquire()
        return
    lock.acquire()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_beside_a_live_run_nothing_is_resumed_or_begun_and_all_can_be_read(
    tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    run, refused = tmp_path / "run", []

    def meanwhile(made: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        for more in ({"resume": "last"}, {}):
            with pytest.raises(BlockingIOError, match=rf"is being written by process {os.getpid()}"):
                trainer(run, **more)
            refused.append(iteration)
        write_report(run)
        compare([run])

    trainer(run, "train.checkpoint_every=1", callbacks=[meanwhile]).fit()
    assert refused == [1, 1, 2, 2]
    assert evaluate(run, num=2)
    trainer(run, "train.iterations=3", resume="last").fit()  # the lock ended with the run
    assert [row["iteration"] for row in read_metrics(run) if row["kind"] == "train"] == [1, 2, 3]


def test_a_trainer_that_fails_holds_nothing(tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    run = tmp_path / "run"
    trainer(run).fit()
    with pytest.raises(ValueError, match="refusing to resume") as kept:  # with its traceback, and so the trainer
        trainer(run, "train.seed=5", resume="last")
    trainer(run, resume="last")
    assert kept.traceback


def test_a_folder_made_meanwhile_is_seen_when_training_begins(tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    """Two that started before there was a folder: the one that comes second must not write over the first."""
    run = tmp_path / "run"
    first, second = trainer(run), trainer(run, "train.seed=5")
    first.fit()
    with pytest.raises(FileExistsError, match="holds a run"):
        second.fit()
    assert "seed: 0" in (run / "config.yaml").read_text()


@pytest.mark.slow
def test_of_three_starts_at_once_one_runs_and_two_say_so(tmp_path: Path, scenes_field: str, tiny: list[str]) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "rlflow", "train", "t2i_flow_grpo", f"policy.field={scenes_field}", *tiny]
    starts = [
        subprocess.Popen(
            [*command, "train.iterations=20", f"train.seed={seed}", "--run", str(run), "--quiet"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    begun = time.monotonic()
    said = [start.communicate(timeout=300) for start in starts]
    codes = [start.returncode for start in starts]
    assert sorted(codes) == [0, 2, 2], (said, time.monotonic() - begun)
    for code, (out, err) in zip(codes, said, strict=True):
        assert (
            ("finished: 20 iterations" in out) if code == 0 else ("is being written by" in err or "holds a run" in err)
        )
        assert err.count("\n") <= 1
    assert f"seed: {codes.index(0)}" in (run / "config.yaml").read_text()
