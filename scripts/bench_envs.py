"""Full environment steps per second of our locomotion environments against Gymnasium's SyncVectorEnv, as JSON.

    python scripts/bench_envs.py --task hopper --envs 1 16 64 --seconds 2 --repeats 3

Both play the same random actions with automatic resets; ours in chunks (default 4), with terminal observations,
returns and lengths. `physics` steps MuJoCo's batch alone, with the resets that random play needs. The contenders
take turns in one process; rates are given per second of wall time and of CPU time (all threads), each the median
of the repeats. On a busy machine only the second can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch

from rlflow.envs import mujoco
from rlflow.envs.sim import SimEnv

TASKS = {
    t.name.removesuffix("-v5").lower(): t
    for t in (mujoco.HOPPER, mujoco.WALKER2D, mujoco.HALFCHEETAH, mujoco.ANT, mujoco.HUMANOID)
}
RESET_EVERY = 20  # primitive steps a random Hopper stands


def ours(task: mujoco.Task, num_envs: int, chunk: int, threads: int) -> Callable[[], int]:
    """One chunk of every row; environment steps carried out."""
    env = SimEnv(mujoco.MujocoSim(task, num_envs, threads), chunk)
    env.reset(torch.arange(num_envs))
    generator = torch.Generator().manual_seed(0)

    def step() -> int:
        done = env.step(torch.rand(num_envs, *env.action_shape, generator=generator) * 2 - 1)
        assert done.num_steps is not None
        return int(done.num_steps.sum())

    return step


def gymnasium_sync(task: mujoco.Task, num_envs: int) -> Callable[[], int]:
    """One step of every row, reset in the same step."""
    makers = [lambda: gymnasium.make(task.name)] * num_envs
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    env = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=mode)
    env.reset(seed=0)
    rng, (low, high) = np.random.default_rng(0), (env.single_action_space.low, env.single_action_space.high)

    def step() -> int:
        env.step(rng.uniform(low, high, (num_envs, len(low))).astype(np.float32))
        return num_envs

    return step


def physics(task: mujoco.Task, num_envs: int, threads: int) -> Callable[[], int]:
    """The batch alone: random controls, and every row at rest again after RESET_EVERY steps, in turn."""
    sim = mujoco.MujocoSim(task, num_envs, threads)
    batch, control, rng = sim.batch, sim.batch.bind("ctrl"), np.random.default_rng(0)
    clock = np.arange(num_envs) % RESET_EVERY
    batch.reset(stage=mujoco.NO_STAGE)

    def step() -> int:
        control[:] = rng.uniform(-1, 1, control.shape)
        batch.step(nstep=task.frame_skip)
        clock[:] = (clock + 1) % RESET_EVERY
        if task.healthy and not clock.all():
            batch.reset(np.flatnonzero(clock == 0), stage=mujoco.NO_STAGE)
        return num_envs

    return step


def rate(step: Callable[[], int], seconds: float) -> tuple[float, float]:
    """(steps per wall second, steps per CPU second) over at least `seconds` of CPU time."""
    step()
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.process_time() - cpu < seconds:
        count += step()
    return count / (time.perf_counter() - wall), count / (time.process_time() - cpu)


def bench(task: mujoco.Task, num_envs: int, chunk: int, threads: int, seconds: float, repeats: int) -> dict[str, Any]:
    """Median rates of the three contenders at one size."""
    contenders = {
        "ours": ours(task, num_envs, chunk, threads),
        "gymnasium_sync": gymnasium_sync(task, num_envs),
        "physics": physics(task, num_envs, threads),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, step in contenders.items():
            found[name].append(rate(step, seconds))
    rows = {}
    for name, rates in found.items():
        wall, cpu = (statistics.median(r) for r in zip(*rates, strict=True))
        rows[name] = {"env_steps_per_s": round(wall), "env_steps_per_cpu_s": round(cpu)}
    return {"task": task.name, "num_envs": num_envs, "chunk": chunk} | rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, nargs="+", default=["hopper"])
    parser.add_argument("--envs", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0, help="0: all CPUs")
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU seconds per measurement")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        bench(TASKS[name], num_envs, args.chunk, args.threads, args.seconds, args.repeats)
        for name in args.task
        for num_envs in args.envs
    ]
    host = {"cpus": os.cpu_count(), "load_1min": os.getloadavg()[0], "machine": platform.processor()}
    print(json.dumps({"host": host, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
