"""MetaWorld (Yu et al. 2020) in EnvPool's C++: a robot arm, and many tasks that a sentence names.

A row's task and the start of its first episode are functions of its seed; its later episodes are of the same task,
from seeds of EnvPool's own. An episode ends as soon as the task is done. Of EnvPool's fifty tasks the scripted
experts of the package metaworld do all but dial-turn (EnvPool 1.2.5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlflow.envs.demos.dataset import Episode
from rlflow.envs.demos.experts import play, successes
from rlflow.envs.seeds import normal
from rlflow.envs.sim import Outcome, Sim, SimEnv
from rlflow.envs.simulators.envpool import make_pool
from rlflow.ranges import Count, Size, Threads
from rlflow.types import Tree

NAMES = """
reach push pick-place door-open drawer-open drawer-close button-press-topdown peg-insert-side window-open window-close
assembly basketball bin-picking box-close button-press-topdown-wall button-press button-press-wall coffee-button
coffee-pull coffee-push dial-turn disassemble door-close door-lock door-unlock hand-insert faucet-open faucet-close
hammer handle-press-side handle-press handle-pull-side handle-pull lever-pull pick-place-wall pick-out-of-hole
plate-slide plate-slide-side plate-slide-back plate-slide-back-side peg-unplug-side soccer stick-push stick-pull
push-wall push-back reach-wall shelf-place sweep-into sweep
"""
MT50 = NAMES.split()
MT10 = MT50[:10]
SUITES = {"mt10": MT10, "mt50": MT50}
WORDS = ["", *dict.fromkeys(word for task in MT50 for word in task.split("-"))]
"""Vocabulary; 0 fills short sentences up."""
LENGTH = max(len(task.split("-")) for task in MT50)
STATE = 39
"""Hand, gripper and up to two objects, now and one step ago, and the place of the goal, as MetaWorld has them."""

HIGHEST = 10.0
"""Of MetaWorld's shaped reward."""


def tasks_of(names: str | Sequence[str]) -> list[str]:
    """Those of a suite's name or of a list; ValueError for one that is not known."""
    tasks = SUITES.get(names, [names]) if isinstance(names, str) else list(names)
    if unknown := sorted(set(tasks) - set(MT50)):
        raise ValueError(f"no task {unknown} in MetaWorld: give {sorted(SUITES)} or some of {MT50}")
    if not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks: name one or more, each once, got {tasks}")
    return tasks


def tokens(task: str) -> list[int]:
    """Word numbers of a task, filled up to LENGTH."""
    words = task.split("-")
    return [WORDS.index(word) for word in words] + [0] * (LENGTH - len(words))


def camel(task: str) -> str:
    """Its name in EnvPool's ids."""
    return task.title().replace("-", "")


class MetaWorldSim(Sim):
    """One pool of `threads` threads for every task that a row has, made at the first reset after `close`."""

    step_seconds = 0.0125

    def __init__(self, tasks: Sequence[str], num_envs: int, horizon: int, sparse: bool = True, threads: int = 1):
        self.tasks, self.num_envs, self.horizon, self.threads = list(tasks), num_envs, horizon, threads
        self.sparse = sparse
        self.low, self.high = -torch.ones(4), torch.ones(4)
        self.asked = torch.zeros(num_envs, dtype=torch.long)  # of `tasks`
        self._sentences = torch.tensor([tokens(task) for task in self.tasks])
        self._pools: list[tuple[NDArray[np.intp], Any]] = []  # rows, their pool
        self._state = np.zeros((num_envs, STATE), np.float32)
        self._reward, self._success = np.zeros((2, num_envs), np.float32)
        state, text = torch.empty(STATE, device="meta"), torch.empty(LENGTH, dtype=torch.long, device="meta")
        self.obs_spec = {"state": state, "text": text}

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        """Start the rows of `mask`: where there are no pools yet from the seeds (B,), else where their pool goes on."""
        if not self._pools:
            self._make(seeds)
        wanted = mask.numpy()
        for rows, pool in self._pools:
            ids = np.flatnonzero(wanted[rows])
            if len(ids):
                self._state[rows[ids]] = pool.reset(ids.astype(np.int32))[0]
        return self._observe()

    def advance(self, action: Tensor) -> Outcome:
        """One step of every pool, all at the same time."""
        actions = action.numpy().astype(np.float32)
        for rows, pool in self._pools:
            pool.send(actions[rows])
        for rows, pool in self._pools:
            self._state[rows], self._reward[rows], _, _, info = pool.recv()
            self._success[rows] = info["success"]
        success = torch.from_numpy(self._success.copy())
        reward = success if self.sparse else torch.from_numpy(self._reward / HIGHEST - 1).where(success == 0, 0.0)
        return Outcome(self._observe(), reward, success > 0, info={"success": success})

    def close(self) -> None:
        """Give the pools up."""
        for _, pool in self._pools:
            pool.close()
        self._pools = []

    def _make(self, seeds: Tensor) -> None:
        """A pool for every task that these seeds (B,) have, with time to spare: the time limit is SimEnv's."""
        self.asked = seeds.remainder(len(self.tasks))
        for task, name in enumerate(self.tasks):
            rows = np.flatnonzero(self.asked.numpy() == task)
            if len(rows):
                options = {"partially_observable": False, "max_episode_steps": 2 * self.horizon}
                pool = make_pool(f"MetaWorld/{camel(name)}-v3", seeds[rows].tolist(), self.threads, options)
                self._pools.append((rows, pool))

    def _observe(self) -> Tree:
        return {"state": torch.from_numpy(self._state.copy()), "text": self._sentences[self.asked]}


class MetaWorld(SimEnv):
    """Ten tasks or fifty, or a list of them; success ends an episode.

    Observation: {"state": 39 numbers, "text": (4,) word numbers}. Action: a chunk of hand velocities and a gripper
    force, 80 a second. Reward: 1 for success; with `sparse` false, MetaWorld's shaped one as a share of its highest,
    less 1, and 0 at success, so that an early end is never a loss. `horizon` primitive steps, then a truncation.
    `threads` are each task's. Rows are reset all together: EnvPool fixes seeds when a pool is made.
    """

    sim: MetaWorldSim

    def __init__(
        self,
        num_envs: int,
        tasks: str | Sequence[str] = "mt10",
        chunk: Size = 5,
        horizon: Count = 150,
        gamma: float = 0.99,
        sparse: bool = True,
        threads: Threads = 1,
    ):
        super().__init__(MetaWorldSim(tasks_of(tasks), num_envs, horizon, sparse, threads), chunk, gamma)

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        """Episode 0 of `seeds` (B,) in all rows, in new pools; ValueError where only some rows are meant."""
        if mask is not None and not bool(mask.all()):
            raise ValueError("EnvPool fixes seeds when a pool is made: reset all rows together")
        self.sim.close()
        return super().reset(seeds)


# -- the experts ----------------------------------------------------------------------------------


def episodes(num: int, seed: int, noise: float) -> Iterator[Episode]:
    """`num` successful episodes of MT10 by the package's experts, disturbed by Gaussian noise of that std.

    Tasks take turns, so each has as many as any other, up to one.
    """
    try:
        from metaworld.policies import ENV_POLICY_MAP
    except ModuleNotFoundError as error:
        fix = "pip install scipy; pip install --no-deps metaworld==3.1.1 (it asks for an older mujoco)"
        raise ModuleNotFoundError(f"{error}: {fix}", name=error.name) from None
    env = MetaWorld(2 * num, chunk=1)
    env_seeds = seed + torch.arange(env.num_envs)
    experts = [ENV_POLICY_MAP[f"{env.sim.tasks[i]}-v3"]() for i in env_seeds.remainder(len(env.sim.tasks))]
    calls = iter(range(env.sim.horizon))

    def act(obs: Tree) -> Tensor:
        """Of every row; its expert reads doubles."""
        eps = normal(env_seeds * env.sim.horizon + next(calls), 4).float()
        state = obs["state"].double().numpy()
        chosen = np.stack([expert.get_action(row) for expert, row in zip(experts, state, strict=True)])
        return (torch.from_numpy(chosen).float() + noise * eps).clamp(-1, 1).unsqueeze(1)

    played, asked = list(play(env, act, seed)), env_seeds.remainder(len(env.sim.tasks))
    by_task = [[played[i] for i in (asked == task).nonzero()[:, 0]] for task in range(len(env.sim.tasks))]
    good = [[episode for episode in shown if episode.success] for shown in by_task]
    return successes((episode for turn in zip_longest(*good) for episode in turn if episode), num)
