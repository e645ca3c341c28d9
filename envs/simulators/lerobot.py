"""LeRobot's environments (pusht, aloha, libero, metaworld, robocasa, ...) as LeRobot's policies see them.

Observed: what LeRobot and its processors of the environment make of it, under LeRobot's names: pictures
(observation.image, observation.images.NAME, 3 x H x W, kept as bytes), observation.state, and "task", the sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlflow.envs.sim import Outcome, SimEnv
from rlflow.envs.simulators.spoken import Spoken
from rlflow.envs.simulators.task_rows import TaskRows
from rlflow.models.lerobot.opening import check_version
from rlflow.ranges import Count, Size
from rlflow.types import Tree

try:
    import gymnasium
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install 'rlflow-torch[robots]'", name=error.name) from None

BYTE = 255


class LeRobotRows(TaskRows):
    """Environments of LeRobot's with its own processors; `before` and `after` are those of the environment."""

    def __init__(
        self, makers: Mapping[str, Callable[[], Any]], num_envs: int, before: Any, after: Any, max_steps: int | None
    ):
        self._before, self._after = before, after
        first = next(iter(makers.values()))()
        limit = max_steps or getattr(first.unwrapped, "_max_episode_steps", None)
        super().__init__({**makers, next(iter(makers)): _once(first, next(iter(makers.values())))}, num_envs, limit)
        seen = self._seen([first.observation_space.sample()])
        self.obs_spec = {name: torch.empty(v.shape[1:], dtype=v.dtype, device="meta") for name, v in seen.items()}

    def _seen(self, rows: list[Any]) -> dict[str, Tensor]:
        """LeRobot's observation of raw ones, pictures as bytes."""
        from lerobot.envs.utils import preprocess_observation

        found = self._before(preprocess_observation(_beside(rows)))
        tensors = {n: v for n, v in found.items() if isinstance(v, Tensor) and n.startswith("observation.")}
        return {n: (v * BYTE).round().byte() if v.ndim == 4 else v.float() for n, v in tensors.items()}

    def observed(self) -> Tree:
        """Of all rows."""
        return self._seen(self._obs)

    def advance(self, action: Tensor) -> Outcome:
        """One step of the rows that have not ended."""
        return super().advance(self._after({"action": action})["action"])

    def sentences(self) -> list[str]:
        """What each row is asked to do, as LeRobot looks it up."""
        return [_sentence(env) for env in self.envs]


def _once(made: Any, make: Callable[[], Any]) -> Callable[[], Any]:
    """Gives what was made already, and new ones from then on."""
    waiting = [made]
    return lambda: waiting.pop() if waiting else make()


def _sentence(env: Any) -> str:
    for name in ("task_description", "task"):
        try:
            return str(env.get_wrapper_attr(name))
        except AttributeError:
            continue
    return ""


def _beside(rows: list[Any]) -> Any:
    """A batched observation of those of rows."""
    if isinstance(rows[0], dict):
        return {name: _beside([row[name] for row in rows]) for name in rows[0]}
    return np.stack([np.asarray(row) for row in rows])


def lerobot(
    num_envs: int,
    type: str,
    task: str | None = None,
    chunk: Size = 1,
    gamma: float = 0.99,
    max_steps: Count | None = None,
    options: dict[str, Any] | None = None,
) -> SimEnv:
    """An environment of LeRobot's by the type that `--env.type` of lerobot-eval names; `options`: other fields of it.

    Of a suite of tasks the seed of an episode fixes which, and scores are told task by task.
    """
    check_version()
    from lerobot.envs.factory import make_env_config

    asked = (options or {}) | ({} if task is None else {"task": task})
    try:
        config = make_env_config(type, **asked)
        suites = config.create_envs(n_envs=1, use_async_envs=False)
    except TypeError as error:
        raise ValueError(f"env.settings.options: {error}") from error
    makers: dict[str, Callable[[], Any]] = {}
    num_tasks = sum(map(len, suites.values()))
    for suite, found in suites.items():
        for number, vector in found.items():
            makers[f"{suite}/{number}" if len(suites) > 1 else str(number)] = _maker(vector, num_tasks)
    before, after = config.get_env_processors()
    sim = LeRobotRows(makers, num_envs, before, after, max_steps)
    sim.step_seconds = 1 / config.fps
    return SimEnv(Spoken(sim, sim.sentences), chunk, gamma)


class SeededStart(gymnasium.Wrapper[Any, Any, Any, Any]):
    """LIBERO plays its recorded starts one after the other, whatever the seed; here the seed of an episode says which.

    A seed is of task `seed % num_tasks`, and of that task's starts in turn the one of `seed // num_tasks`.
    """

    def __init__(self, env: Any, num_tasks: int):
        super().__init__(env)
        self.num_tasks = num_tasks

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """From the start that the seed says."""
        if seed is not None:
            self.unwrapped.init_state_id = seed // self.num_tasks
        return super().reset(seed=seed, options=options)


def _maker(vector: Any, num_tasks: int) -> Callable[[], Any]:
    """Makes one environment as a VectorEnv of LeRobot's does; the one that it holds comes first."""
    make: Callable[[], Any] = _once(vector.envs[0], vector.env_fns[0])
    if getattr(vector.envs[0].unwrapped, "init_state_id", None) is None:
        return make
    return lambda: SeededStart(make(), num_tasks)
