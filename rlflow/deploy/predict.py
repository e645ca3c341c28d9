"""A trained policy for others to call: `Predictor.predict` as stable-baselines3 has it, and `export` to one file.

Not a method of FlowPolicy, which knows neither numpy, nor an environment's bounds, nor a queue of actions.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from rlflow.deploy.steered import Steered, maker
from rlflow.envs.bounds import Bounds
from rlflow.envs.simulators.gym import bounds_of, convert, spec_of
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import All
from rlflow.types import Tree, tree_leaves, tree_map

State = dict[str, Any]
"""queue (N, H, *A): the chunk in hand; left (N,): its actions not yet given; calls: how often a chunk was made."""


def check_units(policy: FlowPolicy) -> None:
    """ValueError for a policy whose actions have units and padding of its own."""
    if policy.field.unguided.decodes_actions:
        raise ValueError(
            "a LeRobot policy acts by LeRobot: rlflow export RUN --format lerobot --out DIR, then its select_action"
        )
    if maker(policy).field.unguided.decodes_actions:
        raise ValueError("what acts on a LeRobot policy is played by rlflow eval: its actions have LeRobot's units")


def chunk_shape(policy: FlowPolicy, obs_spec: Tree) -> tuple[int, ...]:
    """(H, *A) of what a policy's deployment hands over; around a frozen one it is asked, with a row of zeros."""
    if not isinstance(policy.select, Steered):
        return tuple(policy.event_shape)
    row = tree_map(lambda v: torch.zeros(1, *v.shape, dtype=v.dtype, device=policy.device), obs_spec)
    with torch.no_grad():
        return tuple(policy.select.act(policy, row, policy.plan(), Key(0, "shape"), torch.arange(1)).shape[1:])


class Predictor:
    """`predict(obs, state, episode_start)` -> one primitive action per row, made in chunks of H = event_shape[0].

    Of a policy that acts on a frozen one H is the frozen one's.

    `obs_spec`: one row's observation as (meta) tensors. Actions are clipped to [-1, 1] and stretched to `low`,
    `high` as in training (`Bounds`). `weights` names the set that acts.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        obs_spec: Tree,
        low: Tensor | None = None,
        high: Tensor | None = None,
        *,
        seed: int = 0,
        weights: str = "live",
    ):
        check_units(policy)
        self.policy, self.obs_spec, self.seed, self.weights = policy, obs_spec, seed, weights
        self.chunk_shape = chunk_shape(policy, obs_spec)
        if len(self.chunk_shape) < 2:
            raise ValueError(f"a chunk of actions is (H, *A), the policy makes {self.chunk_shape}: set a chunk of 1")
        shape = torch.Size(self.chunk_shape[1:])
        low = torch.full(shape, -1.0) if low is None else low
        high = torch.full(shape, 1.0) if high is None else high
        if low.shape != shape or high.shape != shape:
            raise ValueError(f"bounds of shape {tuple(low.shape)} for actions of shape {tuple(shape)}")
        self.bounds = Bounds(low, high)

    @staticmethod
    def for_spaces(
        policy: FlowPolicy, observation_space: Any, action_space: Any, *, seed: int = 0, weights: str = "live"
    ) -> Predictor:
        """For Gymnasium spaces of one environment (`single_...` of a vector one)."""
        spec = spec_of(observation_space, "the observation space")
        return Predictor(policy, spec, *bounds_of(action_space, "the action space"), seed=seed, weights=weights)

    @torch.no_grad()
    def predict(
        self,
        obs: Any,
        state: State | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, State]:
        """Actions (N, *A), or (*A) for one observation, and the state for the next call.

        Rows whose queue is empty, or whose episode starts, get a new chunk. `deterministic`: without the kernel's
        noise; the start noise is drawn by (seed, calls, row). Without a state nothing is remembered: every call
        plans anew, from the same start noise.
        """
        tensors = convert(obs, self.obs_spec)
        single = tree_leaves(tensors)[0].ndim == tree_leaves(self.obs_spec)[0].ndim
        if single:
            tensors = tree_map(lambda v: v.unsqueeze(0), tensors)
        state = self._start(len(tree_leaves(tensors)[0])) if state is None else dict(state)
        left = state["left"].copy()
        if episode_start is not None:
            left[np.atleast_1d(episode_start).astype(bool)] = 0
        rows = torch.from_numpy(np.flatnonzero(left == 0))
        if len(rows):
            state["queue"] = state["queue"].copy()
            state["queue"][rows.numpy()] = self._chunks(tensors, rows, state["calls"], deterministic)
            left[rows.numpy()] = self.chunk_shape[0]
            state["calls"] += 1
        action = state["queue"][np.arange(len(left)), self.chunk_shape[0] - left]
        state["left"] = left - 1
        return action[0] if single else action, state

    def _start(self, num: int) -> State:
        queue = np.zeros((num, *self.chunk_shape), np.float32)
        return {"queue": queue, "left": np.zeros(num, np.int64), "calls": 0}

    def _chunks(self, obs: Tree, rows: Tensor, calls: int, deterministic: bool) -> np.ndarray:
        policy, key = self.policy, Key(self.seed, "predict", calls)
        plan = policy.plan()
        if not deterministic:
            plan = All()(0, plan.t, rows)
        with policy.using(self.weights):
            asked = tree_map(lambda v: v[rows], obs)
            chunk = policy.select.act(policy, asked, plan, key, rows)
        return self.bounds(chunk.float().cpu()).numpy()


class Deployed(nn.Module):
    """The noise-free chain as one module: (obs (N, ...), x_0 (N, H, *A)) -> actions (N, H, *A) before stretching."""

    def __init__(self, policy: FlowPolicy):
        super().__init__()
        self.field, self.squash = policy.field, policy.squash
        self.solver, self.t = policy.solver, policy.plan().t.tolist()

    def forward(self, obs: Tree, x_0: Tensor) -> Tensor:
        """Every step of the solver, unrolled."""
        cond, x, memory = self.field.encode(obs), x_0, None
        times = [x_0.new_full((1,), t).expand(x_0.shape[0]) for t in self.t]
        for t, t_next in pairwise(times):
            x, memory = self.solver(self.field, x, t, t_next, cond, memory)
        return self.squash(x)


def export(policy: FlowPolicy, obs_spec: Tree, path: str | Path, weights: str = "live") -> None:
    """Write the deployed policy as a .pt2 file of torch.export, for any number of rows; it runs without rlflow:

    `torch.export.load(path).module()(obs, torch.randn(N, H, *A))`; float32 observations, as the environment gives
    them. Bounds are the caller's: clip to [-1, 1] and stretch. A choice among samples, which needs its scorer, is
    refused.
    """
    check_units(policy)
    if policy.select.num > 1:
        raise ValueError(
            f"{policy.select.about} needs its scorer, which is not exported: load the policy without select"
        )
    if isinstance(policy.select, Steered):
        raise ValueError(f"the policy {policy.select.about}, which is not exported: use a Predictor")
    obs = tree_map(lambda v: torch.zeros(2, *v.shape, dtype=v.dtype, device=policy.device), obs_spec)
    x_0 = torch.zeros(2, *policy.event_shape, dtype=policy.dtype, device=policy.device)
    rows = torch.export.Dim("rows", min=1)
    shapes = (_everywhere(obs, {0: rows}), {0: rows})
    with policy.using(weights), torch.no_grad():
        program = torch.export.export(Deployed(policy).eval(), (obs, x_0), dynamic_shapes=shapes)
        torch.export.save(program, path)


def _everywhere(tree: Tree, value: Any) -> Any:
    """`value` in the place of every tensor of a dict tree."""
    return {n: _everywhere(v, value) for n, v in tree.items()} if isinstance(tree, dict) else value
