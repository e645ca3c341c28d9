"""Toy environments with a known optimum: tests, docs and the combination matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlflow.envs.base import VecEnv
from rlflow.types import Step, Tree

CENTRES = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])


def _uniform(seeds: Tensor, num: int) -> Tensor:
    """(B, num) numbers in [0, 1) from integer seeds (B,): a hash, so rows need no Generator."""
    k = torch.arange(1, num + 1, dtype=torch.float64)
    phase = seeds.double()[:, None] * (0.6180339887498949 * k) + (k * k) * 0.7548776662466927
    return (phase.frac() + 1).frac()


class ToyImage(VecEnv):
    """T = 1: the observation is one of four one-hot 'prompts', the action a point, reward -|action - centre|."""

    horizon, action_shape, obs_dim = 1, (2,), 4

    def __init__(self, num_envs: int = 64):
        self.num_envs = num_envs
        self.obs = torch.zeros(num_envs, 4)
        self.action = torch.zeros(num_envs, 2)

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        self.obs = torch.nn.functional.one_hot(seeds % 4, 4).float()
        return self.obs

    def send(self, action: Tensor, rows: slice) -> None:
        self.action[rows] = action.detach().float()

    def recv(self) -> Step:
        reward = -(self.action - self.obs @ CENTRES).norm(dim=-1)
        done = torch.ones(self.num_envs, dtype=torch.bool)
        return Step(self.obs, reward, done, ~done, None, done.clone(), {})


class ToyReach(VecEnv):
    """A point mass that a chunk of two velocity commands moves to a goal; reward is minus the mean distance.

    `horizon` steps, then a truncation (time limit), with automatic reset to the row's next goal.
    Observation: {"state": position, "goal": goal}, a dict like a robot's.
    """

    action_shape, obs_dim = (2, 2), 4

    def __init__(self, num_envs: int = 32, horizon: int = 4):
        self.num_envs, self.horizon = num_envs, horizon
        self.seeds = torch.zeros(num_envs, dtype=torch.long)
        self.pos, self.goal = torch.zeros(num_envs, 2), torch.zeros(num_envs, 2)
        self.elapsed = torch.zeros(num_envs, dtype=torch.long)
        self.action = torch.zeros(num_envs, 2, 2)

    def _obs(self) -> Tree:
        return {"goal": self.goal.clone(), "state": self.pos.clone()}

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        mask = torch.ones(self.num_envs, dtype=torch.bool) if mask is None else mask
        u = _uniform(seeds, 2).float()
        goal = CENTRES[seeds % 4] * (0.6 + 0.8 * u[:, :1])
        self.seeds = torch.where(mask, seeds, self.seeds)
        self.goal = torch.where(mask[:, None], goal, self.goal)
        self.pos = torch.where(mask[:, None], 0.0, self.pos)
        self.elapsed = torch.where(mask, 0, self.elapsed)
        return self._obs()

    def send(self, action: Tensor, rows: slice) -> None:
        self.action[rows] = action.detach().float()

    def recv(self) -> Step:
        reward = torch.zeros(self.num_envs)
        for h in range(2):
            self.pos = self.pos + 0.25 * self.action[:, h].clamp(-1, 1)
            reward = reward - (self.pos - self.goal).norm(dim=-1) / 2
        self.elapsed = self.elapsed + 1
        truncated = self.elapsed >= self.horizon
        final = self._obs()
        obs = self.reset(self.seeds + 1, truncated)
        valid = torch.ones_like(truncated)
        return Step(obs, reward, torch.zeros_like(truncated), truncated, final, valid, {})

    def state_dict(self) -> dict[str, Any]:
        names = ("seeds", "pos", "goal", "elapsed")
        return {n: getattr(self, n).clone() for n in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value.clone())
