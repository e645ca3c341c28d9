"""Runs in processes of their own, to be killed at any moment, and what must then be equal to a run left alone."""

import multiprocessing
import os
import random
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlflow.parallel import dist
from rlflow.report.metrics_file import read_metrics
from rlflow.train import checkpoint
from rlflow.train.checkpoint import Checkpoints, pack
from rlflow.train.trainer import Trainer

WALL_CLOCK = ("time/", "perf/samples_per_s", "perf/env_steps_per_s", "cost/train_seconds_total")
IMPORTED = ["pytest", "rlflow.train.trainer", "rlflow.report.report", "rlflow.report.figures"]
"""By the process that runs are forked from, for each would take seconds."""
HANGS = 400
"""Seconds: what is not done by then hangs, on a machine with other work too."""


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


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, nan included."""
    a, b = (v.contiguous().flatten().view(torch.uint8) if v.numel() else v.flatten() for v in (a, b))
    return torch.equal(a, b)


def assert_equal_runs(a: Path, b: Path) -> None:
    (rows_a, tensors_a, values_a), (rows_b, tensors_b, values_b) = record(a), record(b)
    assert rows_a == rows_b
    assert values_a == values_b
    assert tensors_a.keys() == tensors_b.keys()
    differ = [name for name in tensors_a if not same_bits(tensors_a[name], tensors_b[name])]
    assert not differ


def _slow(real: Callable[..., None]) -> Callable[..., None]:
    def slow(*args: Any) -> None:
        time.sleep(0.02)
        real(*args)
        time.sleep(0.02)

    return slow


def _train(run: str, recipe: str, overrides: list[str], slow: bool, group: dict[str, str]) -> None:
    """Train or go on, perhaps with a disk so slow that most kills hit the writing, perhaps as one of a group."""
    torch.set_num_threads(1)
    os.environ.update(group)
    for name in ("save_tensors", "sync", "_remove") if slow else ():
        setattr(checkpoint, name, _slow(getattr(checkpoint, name)))
    resume = "last" if (Path(run) / "config.yaml").exists() else None
    Trainer(recipe, run, overrides=overrides, resume=resume, quiet=True).fit()
    dist.stop()


def _start(run: Path, recipe: str, overrides: list[str], world: int, slow: bool) -> list[BaseProcess]:
    """The processes of a run, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    started = [context.Process(target=_train, args=(str(run), recipe, overrides, slow, rank)) for rank in ranks]
    for process in started:
        process.start()
    return started


def finish(run: Path, recipe: str, overrides: list[str], world: int = 1) -> None:
    """Train, or go on, to the end."""
    processes = _start(run, recipe, overrides, world, slow=False)
    for process in processes:
        process.join(HANGS)
    codes = [process.exitcode for process in processes]
    _end(processes)
    assert codes == [0] * world


def kill(run: Path, recipe: str, overrides: list[str], rng: random.Random, world: int = 1) -> int:
    """Train or go on for at least an iteration, then kill -9 some or all of the processes; how many were alive.

    Of a group the others have to end by themselves. Whatever the moment, the last checkpoint can be read.
    """
    rows, deadline = len(read_metrics(run)), time.monotonic() + HANGS
    processes = _start(run, recipe, overrides, world, slow=True)
    while len(read_metrics(run)) <= rows and all(p.is_alive() for p in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.4))
    for process in rng.sample(processes, rng.randint(1, world)):
        process.kill()
    for process in processes:
        process.join(HANGS)
    codes = [process.exitcode for process in processes]
    _end(processes)
    assert None not in codes, "a process waits for ever for one that was killed"
    if Checkpoints(run).all():
        Checkpoints(run).load("last")
    return codes.count(-9)


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
        process.join()
