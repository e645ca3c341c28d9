"""Actions of others in the environment's terms: in [-1, 1] of its bounds, as targets or as changes as it takes them.

What an action means is nowhere written down, so it is measured, in the data and in the environment played at random:
of a state s that moves by D while a is done, D = k a + c makes a a change ("delta"), D = k (a - s) + c a target
("absolute"). Both are fits of one pair of numbers, compared by their squared correlations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlflow import registry
from rlflow.datasets.source import Array
from rlflow.envs.base import VecEnv
from rlflow.envs.bounds import Bounds
from rlflow.envs.sim import SimEnv
from rlflow.pretrain.cloning import make_env
from rlflow.types import Tree, tree_leaves

ROWS = 20_000
"""Steps of the data that are looked at."""
FEWEST = 100
"""Below which nothing is told."""
CLEAR, LINEAR = 0.6, 0.97
"""Share of a state's movement that a fit has to explain; that makes the action alone the whole explanation."""
TOLERANCE = 1e-4


@dataclass
class Seen:
    """Range of the actions (A,), and the first steps of the episodes."""

    low: Array | None = None
    high: Array | None = None
    beyond: int = 0  # steps with a number outside the environment's bounds
    rows: int = 0
    moves: list[tuple[Array, Array, Array]] = field(default_factory=list)  # (state, its change, action)

    @staticmethod
    def slack(low: Array, high: Array) -> Array:
        """(A,) by which a number may be beyond its bound, which is rounding."""
        return TOLERANCE * np.where(np.isfinite(high - low), (high - low) / 2, 1.0)

    def add(self, action: Array, low: Array, high: Array, state: Array | None = None) -> None:
        """An episode's actions (L, A), and numbers observed (L, S)."""
        least, most = action.min(0), action.max(0)
        self.low = least if self.low is None else np.minimum(self.low, least)
        self.high = most if self.high is None else np.maximum(self.high, most)
        slack = self.slack(low, high)
        self.beyond += int(((action < low - slack) | (action > high + slack)).any(1).sum())
        if state is not None and len(action) > 1 and sum(len(m[0]) for m in self.moves) < ROWS:
            self.moves.append((state[:-1], np.diff(state, axis=0), action[:-1]))
        self.rows += len(action)


def step_env(env: dict[str, Any], trust_code: bool, num: int = 1) -> VecEnv:
    """`num` rows of an environment, which take actions one by one where they can."""
    known = registry.settings(registry.find("env", env["name"], trust_code))
    settings = {**env.get("settings", {}), **({"chunk": 1} if "chunk" in known else {})}
    return make_env({"name": env["name"], "settings": settings}, num, trust_code)


def bounds_of(env: VecEnv) -> Bounds | None:
    """Those of a simulator's primitive actions; None where it takes what it is given."""
    inner = env.unwrapped
    return inner.bounds if isinstance(inner, SimEnv) else None


def control(moves: list[tuple[Array, Array, Array]]) -> list[str | None]:
    """What each of the A actions is, "delta" or "absolute"; None where no number observed follows it."""
    if sum(len(state) for state, _, _ in moves) < FEWEST or not moves[0][0].shape[1]:
        return []
    state, change, action = (np.concatenate(part).astype(np.float64) for part in zip(*moves, strict=True))
    by_action, own, between = (_correlations(a, b) for a, b in ((action, change), (state, change), (action, state)))
    with_state = _two(by_action, np.diagonal(own), between)
    by_action = by_action**2
    best = with_state.argmax(1)
    pick = (np.arange(len(best)), best)
    return [_name(a, b) for a, b in zip(by_action[pick].tolist(), with_state[pick].tolist(), strict=True)]


def _name(alone: float, both: float) -> str | None:
    if both < CLEAR:
        return None
    if alone > LINEAR or (1 - both) > 0.7 * (1 - alone):
        return "delta"
    return "absolute" if (1 - both) < 0.3 * (1 - alone) else None


def _correlations(a: Array, b: Array) -> Array:
    """(A, S) between the columns of a (N, A) and of b (N, S)."""
    a, b = ((x - x.mean(0)) / np.maximum(x.std(0), 1e-9) for x in (a, b))
    return a.T @ b / len(a)


def _two(action: Array, own: Array, between: Array) -> Array:
    """(A, S) squared multiple correlation of changes with an action (A, S) and the state that changes (S,)."""
    alone = 1 - between**2
    found = (action**2 + own**2 - 2 * action * own * between) / np.maximum(alone, 1e-6)
    return np.clip(np.where(alone > 1e-6, found, action**2), 0, 1)


@torch.no_grad()
def played(env: VecEnv, steps: int = 150) -> list[tuple[Array, Array, Array]]:
    """The same of the environment's first row under random actions."""
    rng = torch.Generator().manual_seed(0)
    obs, moves = env.reset(torch.arange(env.num_envs)), []
    for _ in range(steps):
        action = torch.rand(env.num_envs, 1, *env.action_shape[1:], generator=rng) * 2 - 1
        step = env.step(action.expand(-1, env.action_shape[0], *env.action_shape[1:]).to(env.device))
        before, after = numbers(obs)[:1], numbers(step.reached)[:1]
        moves.append((before, after - before, action[:1].flatten(1).numpy()))
        obs = step.obs
    return moves


def numbers(obs: Tree) -> Array:
    """(N, S) all that is observed but pictures."""
    leaves: list[Tensor] = [v for v in tree_leaves(obs) if v.dtype != torch.uint8]
    flat = [v.flatten(1).float().cpu() for v in leaves]
    return torch.cat(flat, 1).numpy() if flat else np.zeros((len(tree_leaves(obs)[0]), 0), np.float32)
