"""`rlflow demos export`: demonstrations as another program's dataset, actions in the environment's own units."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlflow.datasets.actions import bounds_of, step_env
from rlflow.envs.base import VecEnv
from rlflow.envs.bounds import Bounds
from rlflow.envs.demos.dataset import Demos
from rlflow.types import Tree


@dataclass(frozen=True)
class Played:
    """One episode of L steps as the simulator saw it."""

    number: int
    obs: Tree  # (L, ...)
    action: Tensor  # (L, *A) in the environment's own units
    reward: Tensor  # (L,)
    told: dict[str, Any]  # its row of the table


@dataclass(frozen=True)
class Leaving:
    """Demonstrations on their way out, with what others ask of them."""

    demos: Demos
    env: VecEnv
    bounds: Bounds | None
    fps: float
    task: str

    @property
    def title(self) -> str:
        """The environment's name, of Gymnasium's ones the id."""
        return str(self.demos.env.get("settings", {}).get("env_id", self.demos.env["name"]))

    def episodes(self) -> Iterator[Played]:
        """All of them."""
        for number, row in enumerate(self.demos.episodes):
            steps = torch.arange(row["start"], row["start"] + row["length"])
            action = self.demos.actions(steps)
            own = action if self.bounds is None else self.bounds(action)
            yield Played(number, self.demos.observations(steps), own, self.demos.rewards(steps), row)


class Writer(ABC):
    """One format."""

    @abstractmethod
    def write(self, leaving: Leaving, folder: Path) -> None:
        """All episodes into an empty folder."""


def export_demos(
    source: Path, out: Path, writer: Writer, fps: float | None = None, task: str | None = None, trust_code: bool = False
) -> Demos:
    """Write the demonstrations in `source` by `writer` into `out`, which is there as a whole or not at all."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty: give another folder")
    demos = Demos.open(source)
    demos.check()
    env = step_env(demos.env, trust_code)
    made_by = demos.about["made_by"]
    told = made_by.get("tasks") or [demos.env["name"]]
    leaving = Leaving(
        demos, env, bounds_of(env), fps or made_by.get("fps") or round(1 / env.step_seconds), task or str(told[0])
    )
    work = out.with_name(f".{out.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        writer.write(leaving, work)
        os.replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return demos


def by_name(obs: Tree) -> dict[str, Tensor]:
    """Entries of an observation; a plain tensor is its "state"."""
    return dict(obs) if isinstance(obs, dict) else {"state": obs}


def is_picture(value: Tensor) -> bool:
    """Bytes (L, H, W, 3) or (L, 3, H, W)."""
    return value.dtype == torch.uint8 and value.ndim == 4 and 3 in (value.shape[1], value.shape[3])


def colours_last(pictures: Tensor) -> Tensor:
    """(L, H, W, 3)."""
    return pictures if pictures.shape[3] == 3 else pictures.permute(0, 2, 3, 1)
