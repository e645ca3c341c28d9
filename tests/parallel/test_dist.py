"""Several processes are one: two over gloo, or four of torchrun, in float64 give the weights and the metrics of a single process."""

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlflow.parallel import dist
from rlflow.report.metrics_file import read_metrics
from rlflow.rl.groups import Groups
from rlflow.train.checkpoint import Checkpoints, deal, pack
from rlflow.train.trainer import Trainer
from tests.interrupted import same_bits
from tests.parallel.runs import HANGS, cases, finish, launch

WALL_CLOCK = ("time/", "perf/samples_per_s", "perf/env_steps_per_s", "cost/train_seconds_total")


@pytest.fixture(scope="module")
def four(runs: Path) -> Callable[[str], None]:
    """four(name) has a case run by four processes of torchrun, a group for each; once."""
    return functools.cache(lambda name: finish(launch(runs, 4, "four", name, torchrun=True)))


MASKED = ("one rank masked", "one rank not answered")
CASES = ("grpo", "two rewards, minibatches", "ppo", "nft", "reward gradient", "one rank stopped", *MASKED, "simulator")
BY_MORE = [("two", name) for name in CASES]
BY_MORE += [pytest.param("four", name, marks=pytest.mark.slow) for name in ("grpo", "ppo", "simulator")]


@pytest.mark.parametrize(("folder", "name"), BY_MORE)
def test_weights_and_optimiser_agree(request: pytest.FixtureRequest, runs: Path, folder: str, name: str) -> None:
    if folder == "four":
        request.getfixturevalue("four")(name)
    one, more = (Checkpoints(runs / n / name).load("last")[1] for n in ("one", folder))
    more["collector"] = [deal(more["collector"], Groups(4, 1))] if name == "simulator" else one["collector"]
    one, more = pack(one)[0], pack(more)[0]
    assert one.keys() == more.keys()
    references = [k for k in one if k.startswith("weight_sets/ref/")]
    moved = [k for k in references if not torch.equal(one[k], one[k.replace("ref/", "ema/")])]
    assert moved, "a run that learns nothing proves nothing"
    for key, value in one.items():
        torch.testing.assert_close(
            more[key], value, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize(("folder", "name"), BY_MORE)
def test_every_metric_agrees(request: pytest.FixtureRequest, runs: Path, folder: str, name: str) -> None:
    """The log of rank 0 speaks for all ranks: each number is that of the whole batch, cost included."""
    if folder == "four":
        request.getfixturevalue("four")(name)
    one, more = (read_metrics(runs / n / name) for n in ("one", folder))
    assert [(r["iteration"], r["kind"]) for r in one] == [(r["iteration"], r["kind"]) for r in more]
    for a, b in zip(one, more, strict=True):
        a, b = ({k: v for k, v in r.items() if k != "kind"} for r in (a, b))
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith(WALL_CLOCK) and not key.endswith("/seconds"):
                assert b[key] == pytest.approx(a[key], rel=1e-9, abs=1e-9, nan_ok=True), key


@pytest.mark.parametrize("name", MASKED)
def test_one_rank_without_a_score_hangs_nobody(runs: Path, name: str) -> None:
    """Half of the rows are masked in every iteration, all of them on one rank, and the others still teach."""
    rows = [row for row in read_metrics(runs / "two" / name) if row["kind"] == "train"]
    assert [row["rollout/masked_frac"] for row in rows] == [0.5, 0.5]
    assert all(row["optim/grad_norm"] > 0 and math.isfinite(row["reward/mean"]) for row in rows)


def test_one_rank_that_is_stopped_stops_all(runs: Path) -> None:
    """A signal may reach one process only: all finish the same iteration, save and skip the evaluation."""
    rows = read_metrics(runs / "two" / "one rank stopped")
    assert [(row["iteration"], row["kind"]) for row in rows] == [(0, "eval"), (1, "train")]
    assert Checkpoints(runs / "two" / "one rank stopped").load("last")[0] == 1


def saved(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's last checkpoint."""
    iteration, state = Checkpoints(run).load("last")
    assert iteration == 2
    return pack(state)[0]


def test_two_processes_resume_with_the_episodes_of_each(runs: Path) -> None:
    """1 + 1 iterations are 2, bit for bit: weights, optimiser, and the simulators of both."""
    straight, resumed = saved(runs / "two/simulator"), saved(runs / "two/simulator, resumed")
    assert straight.keys() == resumed.keys()
    assert not [name for name in straight if not same_bits(straight[name], resumed[name])]
    goals = [resumed[f"collector/{rank}/env/env/env/sim/goal"] for rank in (0, 1)]
    assert not torch.equal(*goals), "each process has episodes of its own"


def test_one_process_goes_on_with_the_episodes_of_two(runs: Path, tmp_path: Path) -> None:
    """Their rows are dealt anew in global order: the run is that of one process throughout."""
    run = shutil.copytree(runs / "two/simulator, resumed", tmp_path / "run", symlinks=True)
    Trainer(cases(tmp_path)["simulator"], run, resume="1", quiet=True).fit()
    one, mixed = saved(runs / "one/simulator"), saved(run)
    assert one.keys() == mixed.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            mixed[name], value, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def launched(tmp_path: Path) -> list[str]:
    """`rlflow train` of the GRPO case in two processes, without end."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps(cases(tmp_path)["grpo"] | {"train": {"iterations": 10**6, "tensorboard": False, "report": False}})
    )
    command = ["train", str(path), "--run", str(tmp_path / "run"), "--quiet", "--processes", "2"]
    return [sys.executable, "-m", "rlflow", *command]


@pytest.mark.slow
def test_a_signal_to_the_launcher_reaches_every_process(tmp_path: Path, launched: list[str]) -> None:
    """`--processes 2` shares the groups of an iteration, and Ctrl-C saves a checkpoint and ends well."""
    process = subprocess.Popen(launched, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + HANGS
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and '"train"' in metrics.read_text():
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.05)
    finish(process)
    assert json.loads((tmp_path / "run/run.json").read_text())["world"] == 2
    assert Checkpoints(tmp_path / "run").load("last")[0] >= 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_a_killed_process_ends_all_and_leaves_the_last_checkpoint(tmp_path: Path, launched: list[str]) -> None:
    """The others wait in a collective for ever: the launcher ends them, says who died, and the run resumes."""
    command = [*launched, "train.checkpoint_every=1"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    checkpoints, deadline = Checkpoints(tmp_path / "run"), time.monotonic() + HANGS
    while process.poll() is None and time.monotonic() < deadline and not checkpoints.all():
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(ranks[-1]), signal.SIGKILL)
    _, said = process.communicate(timeout=HANGS)
    assert process.returncode != 0
    assert b"was ended by SIGKILL" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks), "nobody is left behind"
    done, _ = checkpoints.load("last")
    recipe, run = launched[launched.index("train") + 1], tmp_path / "run"
    overrides = [f"train.iterations={done + 1}", "train.checkpoint_every=1"]
    Trainer(recipe, run, overrides=overrides, resume="last", quiet=True).fit()
    assert checkpoints.load("last")[0] == done + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [("env.num_groups=3", "in whole groups"), ("algorithm.num_minibatches=3", "leaves a process without rows")],
)
def test_an_error_in_two_processes_is_said_once_and_at_the_start(
    tmp_path: Path, launched: list[str], override: str, message: str
) -> None:
    said = subprocess.run([*launched, override], capture_output=True, text=True, timeout=HANGS)
    assert said.returncode == 2
    assert said.stderr.count("rlflow: error:") == 1, said.stderr
    assert message in said.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.slow
def test_an_error_of_another_process_is_said(tmp_path: Path, launched: list[str]) -> None:
    """Rank 0 waits in a collective and knows nothing: the one that failed speaks, with its number."""
    (tmp_path / "rlflow_tests_rank.py").write_text(
        "import os\n\nfrom rlflow.flow.kernels import FlowSDE\n\n\nclass Half(FlowSDE):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        if os.environ.get('RANK') == '1':\n            raise ValueError('this machine is another one')\n"
    )
    recipe = Path(launched[launched.index("train") + 1])
    values = json.loads(recipe.read_text())
    values["policy"]["kernel"] = "rlflow_tests_rank:Half"
    recipe.write_text(json.dumps(values))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [*launched, "--trust-code"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, env=environment)
    assert said.returncode == 2
    assert said.stderr.count("rlflow: error: process 1: ") == 1, said.stderr
    assert "this machine is another one" in said.stderr


@pytest.mark.slow
def test_seeds_are_trained_by_processes_one_after_the_other(tmp_path: Path, launched: list[str]) -> None:
    """The group is left after a seed and joined again for the next."""
    process = subprocess.Popen(
        [*launched, "--seeds", "0,1", "train.iterations=1", "train.report=true"],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    finish(process)
    for seed in (0, 1):
        run = tmp_path / f"run/seed-{seed}"
        assert json.loads((run / "run.json").read_text())["world"] == 2
        assert Checkpoints(run).load("last")[0] == 1
        assert (run / "report.html").exists()


def test_one_process_needs_no_group() -> None:
    """Every verb is the identity, and starting without torchrun joins nothing."""
    dist.start()
    value = torch.tensor([1.0, 2.0])
    assert (dist.world(), dist.rank()) == (1, 0)
    for verb in (dist.all_sum, dist.all_max, dist.all_gather_rows):
        assert torch.equal(verb(value), value)
    parameter = torch.nn.Parameter(value)
    dist.sum_gradients([parameter])
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0, 0]
    dist.barrier()
    dist.stop()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cpus_that_a_process_may_not_use_are_not_counted() -> None:
    mine = os.sched_getaffinity(0)
    assert dist.num_cpus() == len(mine)
    os.sched_setaffinity(0, {min(mine)})
    try:
        assert dist.num_cpus() == 1
    finally:
        os.sched_setaffinity(0, mine)
