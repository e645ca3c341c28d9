"""A reward learnt from demonstrations: r = shift - x(decision), x the log density ratio of agent and expert.

A decision is what `inputs` says, of observation s, chunk of actions a and the observation s' that was reached: s and a,
s alone, or s and s'. Numbers are standardised by the expert's and smoothed by uniform noise while fitting, since an
expert's actions lie on their bounds and no density reaches a face of a cube. The sign of `shift` says whether ending an
episode pays: with a positive one to live on is worth something, and that alone keeps a hopper standing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlflow.envs.base import VecEnv
from rlflow.envs.wrappers import Watched
from rlflow.flow.noise import generator
from rlflow.models.mlp import side_by_side
from rlflow.parallel import dist
from rlflow.rl.imitation.ratios import Ratio
from rlflow.rl.off_policy.replay import Transitions
from rlflow.rl.optim import AdamW, Optimizer
from rlflow.types import Step, Tree, tree_leaves, tree_map

Inputs = Literal["state_action", "state", "next_state"]
LIMIT = 10.0
"""Of standardised numbers, on both sides."""
BOUND = 1.0
"""Within which environments carry out actions that an expert kept to."""


@dataclass(frozen=True)
class Fitting:
    """How a ratio is fitted, each time: `steps` of `batch_size` decisions from either side."""

    steps: int = 50
    batch_size: int = 256
    lr: float = 1e-3
    memory: int = 8192  # newest decisions of the agent that are looked at
    smooth: float = 0.05  # half the width of the noise, in the expert's standard deviations
    shift: float = 0.0


class LearnedReward:
    """The ratio, what it is fitted to and its optimiser; `expert` are decisions of demonstrations (M)."""

    def __init__(
        self,
        ratio: Ratio,
        expert: Transitions,
        inputs: Inputs = "state_action",
        fitting: Fitting | None = None,
        device: torch.device | None = None,
        seed: int = 0,
    ):
        self.inputs, self.fitting, self.seed = inputs, fitting or Fitting(), seed
        check_numbers(expert.obs)
        self.device = device or torch.device("cpu")
        self.bounded = bool((expert.action.abs() <= BOUND).all())
        raw = self._raw(expert.obs, expert.action, expert.next_obs)
        std = raw.std(0, unbiased=False)
        self.mean, self.std = raw.mean(0), torch.where(std > 1e-6, std, 1.0)
        self.expert = self._standardised(raw)
        self.ratio = ratio.to(self.device)
        parameters = list(self.ratio.parameters())
        self.optimizer = Optimizer(parameters, AdamW(lr=self.fitting.lr), "imitation.lr") if parameters else None
        self.seen = self.expert.new_zeros(self.fitting.memory, self.expert.shape[1])
        self.counts = torch.zeros(self.fitting.memory, dtype=torch.bool, device=self.device)
        self.head, self.fits = 0, 0

    @staticmethod
    def num_inputs(expert: Transitions, inputs: Inputs) -> int:
        """F of such decisions."""
        obs, action = (v[:1].flatten(1).shape[1] for v in (side_by_side(expert.obs), expert.action))
        return obs + {"state_action": action, "state": 0, "next_state": obs}[inputs]

    def decisions(self, obs: Tree, action: Tensor, next_obs: Tree) -> Tensor:
        """(N, F) standardised, of observations (N, ...), actions (N, *D) as sent and observations reached (N, ...)."""
        return self._standardised(self._raw(obs, action, next_obs))

    def _raw(self, obs: Tree, action: Tensor, next_obs: Tree) -> Tensor:
        done = (action.clamp(-BOUND, BOUND) if self.bounded else action).flatten(1)
        beside = {"state_action": [done], "state": [], "next_state": [side_by_side(next_obs)]}[self.inputs]
        parts = [v.to(self.device, torch.float32).flatten(1) for v in (side_by_side(obs), *beside)]
        return torch.cat(parts, 1)

    def _standardised(self, raw: Tensor) -> Tensor:
        return ((raw - self.mean) / self.std).clamp(-LIMIT, LIMIT)

    @torch.no_grad()
    def reward(self, decisions: Tensor) -> Tensor:
        """(N,) of decisions (N, F)."""
        return self.fitting.shift - self.ratio(decisions)

    def relabel(self, batch: Transitions) -> Transitions:
        """The same with the rewards of today; nothing else changes."""
        reward = self.reward(self.decisions(batch.obs, batch.action, batch.next_obs)).to(batch.reward)
        return replace(batch, reward=torch.where(batch.weight > 0, reward, 0.0))

    def see(self, decisions: Tensor, counts: Tensor) -> None:
        """Remember decisions (N, F) of the agent, of every process, where `counts` (N,)."""
        decisions, counts = dist.all_gather_rows(decisions), dist.all_gather_rows(counts.to(self.device))
        decisions, counts = decisions[-len(self.seen) :], counts[-len(self.seen) :]
        where = (self.head + torch.arange(len(decisions), device=self.device)) % len(self.seen)
        self.seen[where], self.counts[where] = decisions, counts
        self.head = (self.head + len(decisions)) % len(self.seen)

    @torch.enable_grad()  # rollouts are collected without
    def fit(self) -> dict[str, float]:
        """Optimiser steps on what was seen; metrics of the last quarter of them, the same on every process."""
        rng, of_agent = generator("imitation", self.seed, self.fits), self.seen[self.counts]
        self.fits += 1
        if self.optimizer is None or not len(of_agent):
            return {}
        told: list[dict[str, Tensor]] = []
        for _ in range(self.fitting.steps):
            agent, expert = self._draw(of_agent, rng), self._draw(self.expert, rng)
            loss, found = self.ratio.losses(agent, expert)
            self.optimizer.zero_grad()
            (loss / dist.world()).backward()
            self.optimizer.step()
            told.append({name: value.detach() for name, value in found.items()})
        last = told[-max(1, len(told) // 4) :]
        return {f"imitation/{name}": float(torch.stack([row[name] for row in last]).mean()) for name in last[0]}

    def _draw(self, decisions: Tensor, rng: torch.Generator) -> Tensor:
        """Some of (M, F), smoothed."""
        rows = torch.randint(len(decisions), (self.fitting.batch_size,), generator=rng)
        noise = 2 * torch.rand(len(rows), decisions.shape[1], generator=rng) - 1
        return decisions[rows.to(self.device)] + self.fitting.smooth * noise.to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the expert, which the config names."""
        optimizer = {} if self.optimizer is None else {"optimizer": self.optimizer.state_dict()}
        ring = {"seen": self.seen.clone(), "counts": self.counts.clone(), "head": self.head, "fits": self.fits}
        return {"ratio": self.ratio.state_dict(), **ring, **optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.ratio.load_state_dict(state["ratio"])
        self.seen.copy_(state["seen"])
        self.counts.copy_(state["counts"])
        self.head, self.fits = int(state["head"]), int(state["fits"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])


def check_numbers(obs: Tree) -> None:
    """ValueError for pictures, of which no density is kept here."""
    if any(leaf.dtype == torch.uint8 for leaf in tree_leaves(obs)):
        raise ValueError("imitation: densities are of numbers, and the demonstrations show pictures")


class Imitated(Watched):
    """Pays a learned reward in place of the environment's own, and fits it after every `every` steps.

    Rewards of the steps between two fits are of one ratio. The environment's own stay in `info`, as episode_return.
    """

    def __init__(self, env: VecEnv, learned: LearnedReward, every: int):
        super().__init__(env)
        self.learned, self.every, self.steps = learned, every, 0
        self.told: dict[str, float] = {}

    def recv(self) -> Step:
        """The step with its reward replaced; a row that was masked stays so."""
        step = self.env.recv()
        decisions = self.learned.decisions(self.obs, self.action, step.reached)
        sound = step.valid.to(decisions.device) & decisions.isfinite().all(1)
        decisions = torch.where(sound.unsqueeze(1), decisions, 0.0)
        reward = torch.where(sound, self.learned.reward(decisions), torch.nan).to(step.reward)
        self.learned.see(decisions, sound)
        self.obs, self.steps = step.obs, self.steps + 1
        if self.steps % self.every == 0:
            self.told = self.learned.fit()
        return replace(step, reward=reward)

    def metrics(self) -> dict[str, float]:
        """What the last fit told, and those of the environment inside."""
        return self.env.metrics() | self.told

    def state_dict(self) -> dict[str, Any]:
        """With the ratio, its optimiser and what it remembers."""
        obs = tree_map(torch.clone, self.obs)
        mine = {"obs": obs, "steps": self.steps, "learned": self.learned.state_dict()}
        return {"env": self.env.state_dict(), **mine}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.env.load_state_dict(state["env"])
        self.obs, self.steps = tree_map(lambda v: v.to(self.device, copy=True), state["obs"]), int(state["steps"])
        self.learned.load_state_dict(state["learned"])
