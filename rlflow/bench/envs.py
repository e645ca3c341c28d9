"""Full environment steps per second: ours against Gymnasium's vector environments and against the physics alone.

All play random actions with automatic resets; ours in chunks, with terminal observations, returns and lengths. The
contenders take turns, so that a busy machine slows all alike; a rate is the median of the repeats, a ratio the median
of the ratios inside a repeat.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rlflow.envs.base import VecEnv
from rlflow.envs.checked import Checked
from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators import mujoco

TASKS = {
    "hopper": mujoco.HOPPER,
    "walker2d": mujoco.WALKER2D,
    "halfcheetah": mujoco.HALFCHEETAH,
    "ant": mujoco.ANT,
    "humanoid": mujoco.HUMANOID,
}
PERIOD = 64  # steps until the actions come again
RESET_EVERY = 20  # primitive steps a random Hopper stands

Player = Callable[[], int | Tensor]
"""Plays one step of every row; environment steps carried out, in all or by row."""


def drawn(num_envs: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Random actions (num_envs, *shape) in [-1, 1] without end, drawn beforehand: drawing is no part of a step."""
    generator = torch.Generator().manual_seed(0)
    return itertools.cycle(torch.rand((PERIOD, num_envs, *shape), generator=generator) * 2 - 1)


def random_play(env: VecEnv) -> Player:
    """One chunk of every row."""
    env.reset(torch.arange(env.num_envs))
    actions = drawn(env.num_envs, env.action_shape)
    if env.device.type != "cpu":
        actions = itertools.cycle([action.to(env.device) for action in itertools.islice(actions, PERIOD)])

    def step() -> Tensor:
        done = env.step(next(actions))
        assert done.num_steps is not None
        return done.num_steps

    return step


def vector_play(env: Any) -> Player:
    """One step of every row of a vector environment, Gymnasium's, reset by itself; actions between its bounds."""
    env.reset(seed=0)
    space = env.single_action_space
    play = itertools.islice(drawn(env.num_envs, space.shape), PERIOD)
    actions = [space.low + (1 + action.numpy()) / 2 * (space.high - space.low) for action in play]
    ready = itertools.cycle([action.astype(space.dtype) for action in actions])

    def step() -> int:
        env.step(next(ready))
        return env.num_envs

    return step


def pool_play(name: str, num_envs: int) -> Player:
    """One step of every row of EnvPool's, on one thread, of the task's version 4 where it has no 5."""
    import envpool

    known = envpool.list_all_envs()
    found = [task for task in (name, f"{name.removesuffix('-v5')}-v4") if task in known]
    pool = envpool.make_gymnasium(found[0], num_envs=num_envs, num_threads=1)
    pool.reset()
    play = itertools.islice(drawn(num_envs, pool.action_space.shape), PERIOD)
    ready = itertools.cycle(
        [(action.numpy() * pool.action_space.high).astype(pool.action_space.dtype) for action in play]
    )

    def step() -> int:
        pool.step(next(ready))
        return num_envs

    return step


def physics(task: mujoco.Task, num_envs: int, threads: int) -> Player:
    """The batch alone: random controls, and every row at rest again after RESET_EVERY steps, in turn."""
    sim = mujoco.MujocoSim(task, num_envs, threads)
    batch, control, actions = sim.batch, sim.batch.bind("ctrl"), drawn(num_envs, sim.low.shape)
    ready = itertools.cycle([action.numpy() for action in itertools.islice(actions, PERIOD)])
    clock = np.arange(num_envs) % RESET_EVERY
    batch.reset(stage=mujoco.NO_STAGE)

    def step() -> int:
        control[:] = next(ready)
        batch.step(nstep=task.frame_skip)
        clock[:] = (clock + 1) % RESET_EVERY
        if task.healthy and not clock.all():
            batch.reset(np.flatnonzero(clock == 0), stage=mujoco.NO_STAGE)
        return num_envs

    return step


def rate(step: Player, seconds: float) -> tuple[float, float]:
    """(steps per wall second, steps per CPU second of this process) over at least `seconds` of wall time."""
    step()
    wall, cpu = time.perf_counter(), time.process_time()
    made = [step()]
    while time.perf_counter() - wall < seconds:
        made.append(step())
    if isinstance(made[-1], Tensor):
        made[-1].sum().item()  # waits for a GPU
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    count = sum(int(torch.as_tensor(steps).sum()) for steps in made)  # adding up is no part of a step
    return count / wall, count / cpu


def compare(players: dict[str, Player], seconds: float, repeats: int) -> dict[str, Any]:
    """Rates of all that play; under "ratio" what the first does of each other's, under "cpu_ratio" in CPU time."""
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
    wall = {n: median(a / b for (a, _), (b, _) in zip(found[first], found[n], strict=True)) for n in others}
    cpu = {n: median(a / b for (_, a), (_, b) in zip(found[first], found[n], strict=True)) for n in others}
    rows["ratio"], rows["cpu_ratio"] = wall, cpu
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
            "checked": random_play(Checked(SimEnv(mujoco.MujocoSim(task, num_envs, threads), chunk), name)),
            "gymnasium_sync": vector_play(sync),
            "gymnasium_async": vector_play(parallel),
            "physics": physics(task, num_envs, threads),
        }
        rows = compare(players, seconds, repeats)
    finally:
        sync.close(), parallel.close()
    rows["gymnasium_async"]["env_steps_per_cpu_s"] = rows["cpu_ratio"]["gymnasium_async"] = None
    return {"task": task.name, "num_envs": num_envs, "chunk": chunk} | rows
