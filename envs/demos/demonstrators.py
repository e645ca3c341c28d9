"""Who demonstrates: a trained expert, or a scripted oracle with noise, plays whole episodes that are written to disk.

The same name, number, seed and noise give the same data on one machine.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlflow import registry
from rlflow.envs.demos.dataset import Demos, Episode, write_demos
from rlflow.envs.demos.experts import GaussianExpert, embedded_expert, play, versions
from rlflow.types import Tree


@dataclass(frozen=True)
class Expert:
    """A policy trained by scripts/make_demos.py plays with its own noise; the shipped one unless a file is named.

    With `noise` > 0 the quality is mixed: actions of episode i of n get noise of std noise i / (n - 1), from the
    expert's own play to one that falls at once.
    """

    env: str
    file: Path | None = None
    num_episodes: int = 100
    noise: float = 0.0
    packages: ClassVar[tuple[str, ...]] = ("torch", "gymnasium", "mujoco")
    settings: ClassVar[dict[str, Any]] = {}

    def episodes(self, num: int, seed: int) -> tuple[Iterator[Episode], dict[str, Any]]:
        """(one whole episode from each of `num` seeds, what is told of the expert)."""
        path = self.file or embedded_expert(self.env)
        if not path.is_file():
            raise ValueError(f"no expert {path}: python scripts/make_demos.py {self.env} --train makes one")
        policy, trained = GaussianExpert.load(path)
        env = registry.find("env", self.env)(num, chunk=1)
        rng, std = torch.Generator().manual_seed(seed), self.noise * torch.linspace(0, 1, num).unsqueeze(1)

        def act(obs: Tree) -> Tensor:
            action = policy(obs, rng)
            if self.noise:
                action = (action + std * torch.randn(action.shape, generator=rng)).clamp(-1, 1)
            return action.unsqueeze(1)

        return play(env, act, seed), {"expert": trained} | ({"noise": self.noise} if self.noise else {})

    @property
    def options(self) -> str:
        """Of the command that makes the same data."""
        return f" --noise {self.noise:g}" if self.noise else ""


@dataclass(frozen=True)
class Oracle:
    """A scripted oracle plays, with noise of std `noise` on every number of its actions.

    `script` is the path of a function `(num, seed, noise) -> episodes`; it is imported when the oracle plays.
    """

    env: str
    script: str
    noise: float
    packages: tuple[str, ...]
    num_episodes: int = 100
    settings: dict[str, Any] = field(default_factory=dict)  # of the environment

    @property
    def options(self) -> str:
        """Of the command that makes the same data."""
        return f" --noise {self.noise:g}"

    def episodes(self, num: int, seed: int) -> tuple[Iterator[Episode], dict[str, Any]]:
        """(one whole episode from each of `num` seeds, what is told of the oracle)."""
        module, _, function = self.script.partition(":")
        played = getattr(importlib.import_module(module), function)(num, seed, self.noise)
        return played, {"oracle": self.script, "noise": self.noise}


OGBENCH = ("torch", "gymnasium", "mujoco", "ogbench")
METAWORLD = Oracle("metaworld", "rlflow.envs.simulators.metaworld:episodes", 0.2, ("torch", "envpool", "metaworld"))
DEMONSTRATORS: dict[str, Expert | Oracle] = {
    **{name: Expert(name) for name in ("hopper", "walker2d", "halfcheetah")},
    **{f"{name}_mixed": Expert(name, None, 200, 1.2) for name in ("hopper", "walker2d", "halfcheetah")},
    "cube_single": Oracle("cube_single", "rlflow.envs.simulators.ogbench:single_episodes", 0.7, OGBENCH),
    "cube_clouds": Oracle(
        "cube_single",
        "rlflow.envs.simulators.ogbench:cloud_episodes",
        0.7,
        OGBENCH,
        settings={"clouds": 256},
    ),
    "cube_double": Oracle("cube_double", "rlflow.envs.simulators.ogbench:double_episodes", 0.4, OGBENCH),
    "puzzle_3x3": Oracle("puzzle_3x3", "rlflow.envs.simulators.ogbench_puzzle:small_episodes", 0.4, OGBENCH),
    "puzzle_4x4": Oracle("puzzle_4x4", "rlflow.envs.simulators.ogbench_puzzle:large_episodes", 0.4, OGBENCH),
    "metaworld": METAWORLD,
    "metaworld_few": replace(METAWORLD, num_episodes=110),  # ten a task, and one held out of each
    "toy_routes": Oracle("toy_routes", "rlflow.envs.simulators.toy:routes_episodes", 0.15, ("torch",), 400),
    "toy_drive": Oracle("toy_drive", "rlflow.envs.simulators.drive:episodes", 0.05, ("torch",), 4000),
    "tabletop": Oracle("tabletop", "rlflow.envs.simulators.tabletop:episodes", 0.3, ("torch",)),
    "tabletop_clouds": Oracle(
        "tabletop",
        "rlflow.envs.simulators.tabletop:cloud_episodes",
        0.3,
        ("torch",),
        num_episodes=1000,
        settings={"clouds": True},
    ),
}


def demonstrator(name: str, *, expert: Path | None = None, noise: float | None = None) -> Expert | Oracle:
    """The one of an environment, with another expert or another noise; ValueError where it has no such thing."""
    if name not in DEMONSTRATORS:
        raise ValueError(f"nobody demonstrates {name!r}{registry.nearest(name, DEMONSTRATORS)}")
    found = DEMONSTRATORS[name]
    if isinstance(found, Expert):
        if noise is not None and not found.noise:
            raise ValueError(f"noise: the expert of {name} has its own; leave it out, or ask for {name}_mixed")
        return replace(found, file=expert or found.file, noise=found.noise if noise is None else noise)
    if expert is not None:
        raise ValueError(f"expert: {name} is demonstrated by a script; leave it out")
    return found if noise is None else replace(found, noise=noise)


def make_demos(
    name: str,
    folder: Path | str,
    *,
    expert: Path | None = None,
    noise: float | None = None,
    num_episodes: int | None = None,
    seed: int = 0,
) -> Demos:
    """Write demonstrations of an environment; the number of episodes and the noise have defaults of their own."""
    who = demonstrator(name, expert=expert, noise=noise)
    num = num_episodes or who.num_episodes
    episodes, told = who.episodes(num, seed)
    command = f"python scripts/make_demos.py {name} --episodes {num} --seed {seed}{who.options}"
    made_by = {"command": command, "seed": seed, **told, "versions": versions(*who.packages)}
    env = {"name": who.env} | ({"settings": who.settings} if who.settings else {})
    return write_demos(folder, episodes, env, made_by)
