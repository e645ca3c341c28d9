"""Trained experts for demonstrations: small Gaussian policies, and one episode per seed of their play.

The embedded ones were trained by scripts/make_demos.py with stable-baselines3 and stopped at "medium".
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rlflow.console import counted
from rlflow.envs.base import VecEnv
from rlflow.envs.demos.dataset import Episode
from rlflow.files import read_tensors, save_tensors
from rlflow.types import Tree, tree_map


class GaussianExpert(nn.Module):
    """tanh MLP on normalised observations gives the mean; actions are clipped to [-1, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, obs_dim: int, action_dim: int, width: int = 64):
        super().__init__()
        hidden = [nn.Linear(obs_dim, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
        self.net = nn.Sequential(*hidden, nn.Linear(width, action_dim))
        self.log_std = nn.Parameter(torch.zeros(action_dim))
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    @torch.no_grad()
    def forward(self, obs: Tensor, rng: torch.Generator) -> Tensor:
        """Random actions (N, A) for observations (N, obs_dim)."""
        centre = self.net(((obs - self.mean) / self.std).clamp(-10, 10))
        return (centre + self.log_std.exp() * torch.randn(centre.shape, generator=rng)).clamp(-1, 1)

    def save(self, path: Path, made_by: dict[str, Any]) -> None:
        """One safetensors file, which says how it was made."""
        save_tensors(self.state_dict(), path, {"made_by": json.dumps(made_by)})

    @classmethod
    def load(cls, path: Path) -> tuple[GaussianExpert, dict[str, Any]]:
        """(expert, how it was made) of a file."""
        weights = read_tensors(path)
        expert = cls(len(weights["mean"]), len(weights["log_std"]), len(weights["net.0.bias"]))
        expert.load_state_dict(weights)
        with safe_open(path, "pt") as file:
            return expert, json.loads((file.metadata() or {}).get("made_by", "{}"))


def embedded_expert(name: str) -> Path:
    """The file of a shipped expert."""
    return Path(str(resources.files("rlflow") / "assets" / "experts" / f"{name}.safetensors"))


def play(env: VecEnv, act: Callable[[Tree], Tensor], seed: int) -> Iterator[Episode]:
    """Row b's whole episode from seed + b, for every row of an env with chunk = 1: long ones count like short ones."""
    obs = env.reset(seed + torch.arange(env.num_envs))
    running = torch.ones(env.num_envs, dtype=torch.bool)
    kept: list[tuple[Tree, ...]] = []
    ends = torch.full((2, env.num_envs), -1)  # the step that ended each row, and whether by the task
    success = torch.full((env.num_envs,), torch.nan)
    steps = counted(env.horizon, f"steps of {env.num_envs} episodes")
    while bool(running.any()):
        next(steps, None)
        action = act(obs)
        step = env.step(action)
        kept.append((obs, action[:, 0], step.reward))
        now = running & step.ended
        ends[0, now], ends[1, now] = len(kept) - 1, step.terminated[now].long()
        success = torch.where(now, step.info.get("success", success), success)
        running, obs = running & ~step.ended, step.obs
    columns = [_stack(column) for column in zip(*kept, strict=True)]
    for row in range(env.num_envs):
        length, fell = int(ends[0, row]) + 1, bool(ends[1, row])
        obs, action, reward = (_episode(column, length, row) for column in columns)
        told = None if bool(success[row].isnan()) else bool(success[row] > 0)
        yield Episode(obs, action, reward, fell, not fell, told)


def successes(episodes: Iterator[Episode], num: int) -> Iterator[Episode]:
    """The first `num` that reach the goal; ValueError where there are not so many."""
    played = list(episodes)
    good = [episode for episode in played if episode.success]
    if len(good) < num:
        raise ValueError(f"{len(good)} of {len(played)} episodes succeed, {num} are needed: lower the noise")
    yield from good[:num]


def _episode(column: Tree, length: int, row: int) -> Tree:
    """The first `length` steps of one row of (T, B, ...)."""
    return tree_map(lambda v: v[:length, row], column)


def _stack(steps: tuple[Tree, ...]) -> Tree:
    """Time-major (T, B, ...)."""
    if isinstance(steps[0], dict):
        return {name: torch.stack([s[name] for s in steps]) for name in steps[0]}
    return torch.stack(steps)


def versions(*packages: str) -> dict[str, str]:
    """Of Python and the named packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
