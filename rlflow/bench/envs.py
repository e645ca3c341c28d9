"""Full environment steps per second: ours against Gymnasium's vector environments and against the physics alone.

All play random actions with automatic resets; ours in chunks, with terminal observations, returns and lengths. The
contenders take turns, so that a busy machine slows all alike; a rate is the median of the repeats, a ratio the median
of the ratios inside a repeat.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators import mujoco

TASKS = {
    "hopper": mujoco.HOPPER,
    "walker2d": mujoco.WALKER2D,
    "halfcheetah": mujoco.HALFCHEETAH,
    "ant": mujoco.ANT,
    "humanoid": mujoco.HUMANOID,
}
RESET_EVERY = 20  # primitive steps a random Hopper stands

Player = Callable[[], int | Tensor]
"""Plays one step of every row; environment steps carried out, as a tensor where reading it would wait for a GPU."""


def random_play(env: SimEnv) -> Player:
    """One chunk of every row."""
    env.reset(torch.arange(env.num_envs))
    generator = torch.Generator(env.device).manual_seed(0)
    shape = (env.num_envs, *env.action_shape)

    def step() -> Tensor:
        done = env.step(torch.rand(shape, generator=generator, device=env.device) * 2 - 1)
        assert done.num_steps is not None
        return done.num_steps.sum()

    return step


def vector_play(env: gymnasium.vector.VectorEnv) -> Player:
    """One step of every row of Gymnasium's, reset in the same step."""
    env.reset(seed=0)
    rng, (low, high) = np.random.default_rng(0), (env.single_action_space.low, env.single_action_space.high)

    def step() -> int:
        env.step(rng.uniform(low, high, (env.num_envs, len(low))).astype(np.float32))
        return env.num_envs

    return step


def physics(task: mujoco.Task, num_envs: int, threads: int) -> Player:
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


def rate(step: Player, seconds: float) -> tuple[float, float]:
    """(steps per wall second, steps per CPU second of this process) over at least `seconds` of wall time."""
    int(step())
    wall, cpu = time.perf_counter(), time.process_time()
    total = step()
    while time.perf_counter() - wall < seconds:
        total = total + step()
    count = int(total)  # waits for a GPU
    return count / (time.perf_counter() - wall), count / (time.process_time() - cpu)


def compare(players: dict[str, Player], seconds: float, repeats: int) -> dict[str, Any]:
    """Rates of all that play, and under "ratio" what the first does of each other's."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in players}
    for _ in range(repeats):
        for name, step in players.items():
            found[name].append(rate(step, seconds))
    median = statistics.median
    rows: dict[str, Any] = {
        name: {
            "env_steps_per_s": round(median(wall for wall, _ in rates), 1),
            "env_steps_per_cpu_s": round(median(cpu for _, cpu in rates), 1),
        }
        for name, rates in found.items()
    }
    first, *others = found
    walls = {name: [wall for wall, _ in rates] for name, rates in found.items()}
    rows["ratio"] = {n: median(a / b for a, b in zip(walls[first], walls[n], strict=True)) for n in others}
    return rows


def bench_envs(name: str, num_envs: int, chunk: int, threads: int, seconds: float, repeats: int) -> dict[str, Any]:
    """One task at one size; AsyncVectorEnv works in other processes, so it has no rate per CPU second."""
    task = TASKS[name]
    makers, mode = [lambda: gymnasium.make(task.name)] * num_envs, gymnasium.vector.AutoresetMode.SAME_STEP
    with mujoco.warnings_kept():
        sync = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=mode)
        parallel = gymnasium.vector.AsyncVectorEnv(makers, autoreset_mode=mode)
    try:
        players = {
            "ours": random_play(SimEnv(mujoco.MujocoSim(task, num_envs, threads), chunk)),
            "gymnasium_sync": vector_play(sync),
            "gymnasium_async": vector_play(parallel),
            "physics": physics(task, num_envs, threads),
        }
        rows = compare(players, seconds, repeats)
    finally:
        sync.close(), parallel.close()
    rows["gymnasium_async"]["env_steps_per_cpu_s"] = None
    return {"task": task.name, "num_envs": num_envs, "chunk": chunk} | rows
