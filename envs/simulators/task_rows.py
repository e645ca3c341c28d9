"""Many tasks, each an environment of its own: a row borrows one of the task that its seed asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlflow.envs.simulators.gym import GymRows
from rlflow.types import Tree

NOBODY = -1


class TaskRows(GymRows):
    """`makers`: by task what makes its environment, all with the same spaces. The seed of an episode fixes its task.

    An environment is made where none of its task is idle, so there are hardly more than rows.
    """

    def __init__(
        self,
        makers: Mapping[str, Callable[[], Any]],
        num_envs: int,
        max_steps: int | None = None,
        success: str | None = None,
    ):
        self._makers, names = list(makers.values()), list(makers)
        first = self._makers[0]()
        super().__init__([first] * num_envs, names[0], max_steps, success)
        self._idle: list[list[Any]] = [[first], *([] for _ in names[1:])]
        self.asked = torch.full((num_envs,), NOBODY)
        self.tasks = names if len(names) > 1 else ()

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        """Each row's own `reset(seed=...)`, in an environment of the task of its seed."""
        rows, wanted = np.flatnonzero(mask.numpy()), seeds.remainder(len(self._makers))
        for row in rows:
            if self.asked[row] not in (NOBODY, wanted[row]):
                self._idle[self.asked[row]].append(self.envs[row])
                self.asked[row] = NOBODY
        for row in rows:
            if self.asked[row] == NOBODY:
                idle = self._idle[wanted[row]]
                self.envs[row] = idle.pop() if idle else self._makers[wanted[row]]()
                self.asked[row] = wanted[row]
        return super().reset(seeds, mask)
