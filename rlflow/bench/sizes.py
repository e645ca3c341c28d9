"""Throughput and peak memory against size: images per iteration, environments, K, replay, rows of metrics, prompts.

Every point is a process of its own, `python -m rlflow.bench.sizes KIND SIZE`, since memory is told of a process.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "images": ("images per iteration", "images/s", (6, 12, 24, 48)),
    "environments": ("environments", "steps/s", (1, 4, 16, 64, 256)),
    "denoising_steps": ("denoising steps K", "actions/s", (1, 2, 4, 8, 16)),
    "replay": ("decisions in the replay", "draws of 256/s", (10_000, 100_000, 1_000_000)),
    "reports_columns": ("rows of metrics", "rows/s", (1_000, 10_000, 100_000)),
    "prompts_columns": ("lines of prompts", "lines/s", (1_000, 10_000, 100_000, 1_000_000)),
}
"""What the number is, what is counted, and the numbers."""

Timed = Callable[[], float]
"""Does the work; how many units it did."""


def images(num: int) -> Timed:
    """Flow-GRPO iterations of the shipped model."""
    from rlflow.bench.iterations import Real, Setting
    from rlflow.bench.methods import methods

    real = Real(Setting("shapes", rows=num, group_size=6, num_steps=6, micro_batch=min(num, 24)), methods(window=2)[0])

    def run() -> float:
        real(0)
        return num

    return run


def environments(num: int) -> Timed:
    """Steps of Hopper under random actions."""
    from rlflow.bench.envs import random_play
    from rlflow.envs.simulators import mujoco

    step = random_play(mujoco.hopper(num, threads=1))
    return lambda: float(sum(int(torch.as_tensor(step()).sum()) for _ in range(max(1, 256 // num))))


def denoising_steps(num: int) -> Timed:
    """Actions of 64 environments by a flow policy of 256 x 3."""
    from rlflow.bench.robot import flow_policy
    from rlflow.envs.simulators import mujoco
    from rlflow.flow.noise import Key

    policy = flow_policy(mujoco.hopper(64, threads=1), 256, 3, num)
    obs, ids = torch.randn(64, 11), torch.arange(64)

    @torch.no_grad()
    def run() -> float:
        for call in range(10):
            policy.sample(policy.encode(obs), policy.plan(num), key=Key(0, "bench", 0, call), row_ids=ids)
        return 640.0

    return run


def replay(num: int) -> Timed:
    """Batches of 256 from a full replay of Hopper's numbers."""
    from rlflow.rl.off_policy.replay import Replay
    from rlflow.types import Rollout

    rows, steps = 16, 100
    replay, obs = Replay(num, 0.99), torch.randn(steps, rows, 11)
    never, ids = torch.zeros(steps, rows, dtype=torch.bool), torch.arange(steps * rows).view(steps, rows)
    full = Rollout(
        obs,
        torch.zeros(steps, rows, 1, 3),
        obs[..., 0],
        never,
        never,
        torch.ones(steps, rows),
        obs[0],
        None,
        ids[0],
        ids,
    )
    for _ in range(math.ceil(num / (steps * rows))):
        replay.add(full, full.action)
    generator = torch.Generator().manual_seed(0)

    def run() -> float:
        for _ in range(100):
            replay.at(replay.draw(256, generator))
        return 100.0

    return run


def reports_columns(num: int) -> Timed:
    """metrics.jsonl read by columns."""
    from rlflow.report.metrics_file import read_table

    folder = _metrics(num)
    return lambda: float(len(read_table(folder)))


def reports_dicts(num: int) -> Timed:
    """The same as a list of dicts."""
    folder = _metrics(num)

    def run() -> float:
        with (folder / "metrics.jsonl").open() as file:
            return float(len([json.loads(line) for line in file]))

    return run


def _metrics(num: int) -> Path:
    from rlflow.report.metrics_file import METRICS, encode_row

    folder = Path(tempfile.mkdtemp(prefix="rlflow-bench-"))
    with (folder / METRICS).open("wb") as file:
        for i in range(num):
            file.write(encode_row(i, "train", {f"part/{k}": i * 0.1 + k for k in range(30)}))
    return folder


def prompts_columns(num: int) -> Timed:
    """A file's training part, its held-out part and one epoch's order."""
    from rlflow.envs.prompts import load_prompts

    path = str(_prompts(num))

    def run() -> float:
        parts = load_prompts(path), load_prompts(path, "heldout")
        parts[0].take(parts[0].index(range(24), 0))
        return float(sum(map(len, parts)))

    return run


def prompts_dicts(num: int) -> Timed:
    """The same by a dict a line and a set of prompts."""
    import hashlib

    path = _prompts(num)

    def run() -> float:
        rows = [{"prompt": line.strip(), "place": f"{path}:{i}"} for i, line in enumerate(path.open(), 1)]
        texts = {row["prompt"] for row in rows}
        held = set(sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[: len(texts) // 5])
        parts = [row for row in rows if row["prompt"] not in held], [row for row in rows if row["prompt"] in held]
        return float(sum(map(len, parts)))

    return run


def _prompts(num: int) -> Path:
    from rlflow.envs.captions import scenes

    captions = scenes.train_captions()
    path = Path(tempfile.mkdtemp(prefix="rlflow-bench-")) / "prompts.txt"
    with path.open("w") as file:
        file.writelines(f"{captions[i % len(captions)]}\n" for i in range(num))
    return path


KINDS: dict[str, Callable[[int], Timed]] = {
    "images": images,
    "environments": environments,
    "denoising_steps": denoising_steps,
    "replay": replay,
    "reports_columns": reports_columns,
    "reports_dicts": reports_dicts,
    "prompts_columns": prompts_columns,
    "prompts_dicts": prompts_dicts,
}
ONCE = ("reports", "prompts")  # what is read is read once


def peak_mib() -> float:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)


def point(kind: str, num: int) -> dict[str, float]:
    """Units per CPU second, CPU seconds of one go, and MiB that it added to the process."""
    torch.set_num_threads(1)
    once = kind.startswith(ONCE)
    before = peak_mib()
    run = KINDS[kind](num)
    if once:
        before = peak_mib()
    spent, units = [], 0.0
    for _ in range(1 if once else 4):
        begin = time.process_time()
        units = run()
        spent.append(time.process_time() - begin)
    seconds = max(1e-9, sorted(spent)[0])
    return {"size": num, "rate": units / seconds, "cpu_s": seconds, "mib": max(0.0, peak_mib() - before)}


def bench_sizes(kinds: tuple[str, ...] = tuple(SIZES)) -> dict[str, Any]:
    """Every point; about three CPU minutes."""
    found = {}
    for kind in kinds:
        about, unit, sizes = SIZES[kind]
        runs = [
            subprocess.run(
                [sys.executable, "-m", "rlflow.bench.sizes", kind, str(n)], check=True, capture_output=True, text=True
            )
            for n in sizes
        ]
        found[kind] = {"about": about, "unit": unit, "points": [json.loads(run.stdout) for run in runs]}
    return found | {"setting": {"cpus": os.cpu_count(), "load": list(os.getloadavg())}}


if __name__ == "__main__":
    base, _, power = sys.argv[2].partition("^")
    print(json.dumps(point(sys.argv[1], int(base) ** int(power or 1))))
