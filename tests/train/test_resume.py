"""Resume: however a run was interrupted, going on from its folder gives the run that was never interrupted."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlflow.report.metrics_file import read_metrics
from rlflow.train import checkpoint
from rlflow.train.checkpoint import Checkpoints, pack
from rlflow.train.trainer import Trainer

Make = Callable[..., Trainer]
WALL_CLOCK = ("time/", "perf/samples_per_s", "cost/train_seconds_total")


def record(run: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], dict[str, Any]]:
    """Everything that must be equal: metric rows, tensors and counters, without what a clock measured."""
    rows = [
        {k: v for k, v in row.items() if not k.startswith(WALL_CLOCK) and not k.endswith("/seconds")}
        for row in read_metrics(run)
    ]
    _, state = Checkpoints(run).load("last")
    tensors, values = pack(state)
    del values["trainer"]["seconds"]
    return rows, tensors, values


def assert_equal_runs(a: Path, b: Path) -> None:
    (rows_a, tensors_a, values_a), (rows_b, tensors_b, values_b) = record(a), record(b)
    assert rows_a == rows_b
    assert values_a == values_b
    assert tensors_a.keys() == tensors_b.keys()
    differ = [name for name in tensors_a if not torch.equal(tensors_a[name], tensors_b[name])]
    assert not differ


def stop_at(when: int) -> Callable[[Trainer, int, dict[str, float]], None]:
    """A callback that ends the run after iteration `when`."""

    def callback(made: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        if iteration == when:
            made.stop()

    return callback


VARIANTS = {
    "flow_grpo": ("t2i_flow_grpo", []),
    "cosine, warm-up, KL": (
        "t2i_flow_grpo",
        ["algorithm.optimizer.cosine=true", "algorithm.optimizer.warmup=3", "algorithm.kl.beta=0.1", "eval.every=1"],
    ),
    "minibatches, epochs": ("t2i_flow_grpo", ["algorithm.num_minibatches=2", "algorithm.epochs=2"]),
    "critic": ("t2i_ppo", ["algorithm.critic_steps=2"]),
    "sliding window": ("t2i_mixgrpo_flash", ["steps={name: window, size: 2, every: 1, skip_last: 1, compress: 0.6}"]),
    "random steps, shared noise": ("t2i_dance_grpo", ["env.shared_noise=true", "algorithm.num_minibatches=2"]),
    "control": ("t2i_flow_grpo", ["train.permute_rewards=true"]),
    "noise net": (
        "t2i_flow_grpo_fast",
        ["policy.kernel=learned_noise", "likelihood.joint=true", "algorithm.entropy=0.01", "steps=all"],
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_and_two_are_four(tmp_path: Path, trainer: Make, name: str) -> None:
    """Weights, EMA, reference, optimiser, counters and every metric but the clock's, bit for bit."""
    recipe, overrides = VARIANTS[name]
    overrides = ["train.iterations=4", *overrides]
    trainer(tmp_path / "straight", *overrides, recipe=recipe).fit()
    trainer(tmp_path / "broken", *overrides, recipe=recipe, callbacks=[stop_at(2)]).fit()
    torch.rand(7)  # the process that goes on has another past
    resumed = trainer(tmp_path / "broken", *overrides, recipe=recipe, resume="last")
    assert resumed.iteration == 2
    resumed.fit()
    assert_equal_runs(tmp_path / "straight", tmp_path / "broken")
    norms = [row["optim/grad_norm"] for row in read_metrics(tmp_path / "broken") if row["kind"] == "train"]
    assert min(norms) > 0, "a run that learns nothing proves nothing"


def test_from_an_earlier_checkpoint_the_future_is_cut(tmp_path: Path, trainer: Make) -> None:
    """Rows, checkpoints and links after it are gone, and the run repeats itself exactly."""
    overrides = ["train.iterations=4", "train.checkpoint_every=1", "train.keep=9", "eval.every=2"]
    trainer(tmp_path / "straight", *overrides).fit()
    trainer(tmp_path / "again", *overrides).fit()
    resumed = trainer(tmp_path / "again", *overrides, resume="2")
    assert resumed.iteration == 2
    assert Checkpoints(tmp_path / "again").load("last")[0] == 2
    resumed.fit()
    assert_equal_runs(tmp_path / "straight", tmp_path / "again")


def test_rows_after_the_checkpoint_are_cut(tmp_path: Path, trainer: Make) -> None:
    """A run killed between checkpoints logged iterations that its checkpoint does not know."""
    overrides = ["train.iterations=5", "train.checkpoint_every=2"]
    trainer(tmp_path / "straight", *overrides).fit()

    def die(made: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        if iteration == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path / "killed", *overrides, callbacks=[die]).fit()
    assert read_metrics(tmp_path / "killed")[-1]["iteration"] == 3
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "kind": "tr')  # torn by the kill
    trainer(tmp_path / "killed", *overrides, resume="last").fit()
    assert_equal_runs(tmp_path / "straight", tmp_path / "killed")


def test_killed_before_the_first_checkpoint_begins_again(
    tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.yaml exists, a checkpoint does not: `--resume last` starts over, and no row is there twice."""
    trainer(tmp_path / "straight").fit()

    def die(self: Trainer, result: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_keep", die)
        with pytest.raises(ZeroDivisionError):
            trainer(tmp_path / "killed").fit()
    assert Checkpoints(tmp_path / "killed").all() == []
    assert len(read_metrics(tmp_path / "killed")) == 1
    trainer(tmp_path / "killed", resume="last").fit()
    assert_equal_runs(tmp_path / "straight", tmp_path / "killed")


def test_killed_in_the_last_evaluation(tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last iteration is saved, its evaluation logged but not saved: it is made again, not logged twice."""
    overrides = ["train.checkpoint_every=1"]
    trainer(tmp_path / "straight", *overrides).fit()
    made = trainer(tmp_path / "killed", *overrides)
    real = Trainer._keep

    def die(self: Trainer, result: Any) -> None:
        if self.iteration == 2:
            raise ZeroDivisionError
        real(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_keep", die)
        with pytest.raises(ZeroDivisionError):
            made.fit()
    trainer(tmp_path / "killed", *overrides, resume="last").fit()
    assert_equal_runs(tmp_path / "straight", tmp_path / "killed")
    assert Checkpoints(tmp_path / "killed").best_score() is not None


def test_a_finished_run_resumes_to_the_same_end(tmp_path: Path, trainer: Make) -> None:
    trainer(tmp_path / "run").fit()
    before = record(tmp_path / "run")
    trainer(tmp_path / "run", resume="last").fit()
    after = record(tmp_path / "run")
    assert before[0] == after[0]
    assert before[2] == after[2]


def test_run_json_keeps_the_start_and_lists_the_resumes(
    tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    for number, more in enumerate(({"callbacks": [stop_at(1)]}, {"resume": "last"}, {"resume": "2"})):
        monkeypatch.setattr(sys, "argv", ["rlflow", f"command-{number}"])
        trainer(run, **more).fit()
        if not number:
            first = json.loads((run / "run.json").read_text())
    head = json.loads((run / "run.json").read_text())
    resumes = head.pop("resumes")
    assert head == first
    assert head["command"] == "rlflow command-0"
    said = [(r["iteration"], r["command"]) for r in resumes]
    assert said == [(1, "rlflow command-1"), (2, "rlflow command-2")]
    assert all({"started", "versions", "world"} <= r.keys() for r in resumes)


def test_a_finished_run_can_be_given_more(tmp_path: Path, trainer: Make) -> None:
    """The budget may grow, and config.yaml says so afterwards."""
    constant = "algorithm.optimizer.cosine=false"  # else the learning rate depends on the budget
    trainer(tmp_path / "straight", constant, "train.iterations=4").fit()
    trainer(tmp_path / "run", constant).fit()
    trainer(tmp_path / "run", constant, "train.iterations=4", resume="last").fit()
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["iterations"] == 4
    assert [r for r in record(tmp_path / "run")[0] if (r["kind"], r["iteration"]) != ("eval", 2)] == record(
        tmp_path / "straight"
    )[0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm.optimizer.lr=1e-3", r"algorithm\.optimizer\.lr: 0\.\d+ -> 0\.001"),
        ("env.group_size=2", r"env\.group_size: 4 -> 2"),
        ("policy.kernel.a=0.5", r"policy\.kernel\.a: 0\.7 -> 0\.5"),
        ("train.seed=1", r"train\.seed: 0 -> 1"),
        ("eval.num=7", r"eval\.num: 6 -> 7"),
    ],
)
def test_a_changed_config_is_refused_by_name(tmp_path: Path, trainer: Make, override: str, said: str) -> None:
    trainer(tmp_path / "run").fit()
    before = record(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"refusing to resume under a changed config:\n  {said}$"):
        trainer(tmp_path / "run", override, resume="last")
    assert record(tmp_path / "run")[0] == before[0]


def test_without_a_run_there_is_nothing_to_resume(tmp_path: Path, trainer: Make) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing to resume: .*none/config.yaml does not exist"):
        trainer(tmp_path / "none", resume="last")
    trainer(tmp_path / "run").fit()
    with pytest.raises(ValueError, match=r"no checkpoint '9'.*'000002'"):
        trainer(tmp_path / "run", resume="9")


# -- kill -9 --------------------------------------------------------------------------------------

KILLED = [
    "train.iterations=40",
    "train.checkpoint_every=1",
    "train.keep=2",
    "eval.every=5",
    "eval.num=2",
    "eval.grid=1",
]


def _slow(real: Callable[..., None]) -> Callable[..., None]:
    def slow(*args: Any) -> None:
        time.sleep(0.02)
        real(*args)
        time.sleep(0.02)

    return slow


def _train(run: str, field: str, overrides: list[str]) -> None:
    """Train or go on, in a process of its own, with a disk so slow that most kills hit the writing."""
    torch.set_num_threads(1)
    for name in ("save_tensors", "sync", "_remove"):
        setattr(checkpoint, name, _slow(getattr(checkpoint, name)))
    import rlflow.report.report

    rlflow.report.report.write_report = lambda folder: Path(folder)
    resume = "last" if (Path(run) / "config.yaml").exists() else None
    Trainer("t2i_flow_grpo", run, overrides=[*overrides, f"policy.field={field}"], resume=resume, quiet=True).fit()


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path: Path, scenes_field: str, tiny: list[str], trainer: Make) -> None:
    """Killed eight times anywhere, mostly inside a checkpoint; the end is bitwise that of a run left alone."""
    overrides = [*tiny, "train.minutes=", *KILLED]
    trainer(tmp_path / "straight", *KILLED).fit()
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["rlflow.train.trainer", "rlflow.report.report"])
    rng, run = random.Random(0), tmp_path / "killed"
    for _ in range(8):
        process = spawn.Process(target=_train, args=(str(run), scenes_field, overrides))
        rows = len(read_metrics(run))
        process.start()
        deadline = time.monotonic() + 60
        while len(read_metrics(run)) <= rows and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.join()
        if Checkpoints(run).all():
            Checkpoints(run).load("last")
    process = spawn.Process(target=_train, args=(str(run), scenes_field, overrides))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert_equal_runs(tmp_path / "straight", run)


@pytest.mark.slow
def test_the_command_stops_cleanly_on_sigterm(tmp_path: Path, scenes_field: str, tiny: list[str]) -> None:
    """Exit code 0, a checkpoint, and the same command with --resume last goes on."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "rlflow", "train", "t2i_flow_grpo", *tiny, f"policy.field={scenes_field}"]
    command += ["train.minutes=", "train.iterations=100000", "--run", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while len(read_metrics(run)) < 3 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped by a signal" in out
    iteration, _ = Checkpoints(run).load("last")
    command[command.index("train.iterations=100000")] = f"train.iterations={iteration + 1}"
    subprocess.run([*command, "--resume", "last"], check=True, timeout=120)
    assert Checkpoints(run).load("last")[0] == iteration + 1
    assert json.loads((run / "run.json").read_text())["recipe"] == "t2i_flow_grpo"
    assert os.path.realpath(run / "checkpoints/last").endswith(f"{iteration + 1:06d}")
