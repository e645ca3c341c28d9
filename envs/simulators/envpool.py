"""EnvPool (Weng et al. 2022, arXiv:2206.10558): MetaWorld, DM control and many more, stepped by a pool of C++ threads.

EnvPool fixes seeds when a pool is made and starts ended episodes at the next step from seeds of its own. So a reset
of all rows makes a new pool: the first episodes are functions of `seeds`, later ones of them and their number.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from rlflow.envs.seeds import narrow
from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators.gym_vector import NextStepSim
from rlflow.ranges import Threads


def make_pool(env_id: str, seeds: list[int], threads: int, options: dict[str, Any]) -> Any:
    """A pool with one environment for every seed; `options` go to envpool.make_gymnasium."""
    try:
        import envpool  # takes a second
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: pip install 'rlflow-torch[envpool]'", name=error.name) from None

    known = envpool.list_all_envs()
    if env_id not in known:
        raise ValueError(f"EnvPool has no environment {env_id!r}; envpool.list_all_envs() names {len(known)}")
    narrowed = narrow(torch.tensor(seeds)).tolist()
    return envpool.make_gymnasium(env_id, seed=narrowed, num_envs=len(seeds), num_threads=threads, **options)


class EnvPoolSim(NextStepSim):
    """`num_envs` copies of an EnvPool environment; `options` go to envpool.make_gymnasium."""

    def __init__(self, env_id: str, num_envs: int, threads: int, options: dict[str, Any], success: str | None = None):
        self._pool = partial(make_pool, env_id, threads=threads, options=options)
        pool = self._pool([0] * num_envs)
        super().__init__(pool, pool.spec.config.max_episode_steps, success)

    def _start(self, seeds: list[int]) -> Any:
        self.env.close()
        self.env = self._pool(seeds)
        return self.env.reset()[0]


def envpool(
    num_envs: int,
    env_id: str,
    gamma: float = 0.99,
    threads: Threads = 0,
    options: dict[str, Any] | None = None,
    success: str | None = None,
) -> SimEnv:
    """An environment of EnvPool with Box or Dict observations and Box actions; `threads` 0 takes as many as it likes.

    `success` names the entry of its info that says whether the task is done, unless that has a usual name. No chunks:
    rows reset by themselves.
    """
    return SimEnv(EnvPoolSim(env_id, num_envs, threads, options or {}, success), 1, gamma)
