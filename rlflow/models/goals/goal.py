"""A policy of trajectories that is told a goal, chosen by two scores over a vocabulary (GoalFlow, Xing et al. 2025).

The vocabulary holds cluster centres of where demonstrations end. Of each goal g in a scene two scores are learnt: how
near it is to where the demonstrator went, against softmax_g(-|g - g*|^2), and whether it is free. The one to take is

    argmax_g  w_near log softmax(near)_g + w_free log sigmoid(free)_g

The flow is conditioned on scene and goal; `null` hides the goal, so guidance may lean on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlflow.flow.field import VelocityField
from rlflow.models.mlp import MLPField, mlp
from rlflow.models.normalizer import Normalizer
from rlflow.ranges import Size
from rlflow.types import Cond, Tree

GOAL = "goal"
"""The entry of an observation that is a goal (N, 2)."""
NEAR, FREE = 0.1, 3.0
"""Weights of the two scores, as released."""


def kmeans(points: Tensor, num: int, rounds: int = 50, seed: int = 0) -> Tensor:
    """(num, D) centres of points (M, D) by Lloyd's rounds from distinct random points; of data and seed alone."""
    distinct = points.unique(dim=0)
    if len(distinct) < num:
        raise ValueError(f"{num} clusters of {len(distinct)} distinct points: take fewer")
    centres = distinct[torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))[:num]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        counts = torch.zeros(num).index_add_(0, nearest, torch.ones(len(points)))
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    return centres


class GoalField(VelocityField):
    """v(x, t | scene, goal): an MLP over the scene's numbers, goal and a flag; `goals` (V, 2) are in the checkpoint."""

    goals: Tensor

    def __init__(
        self, obs_dim: int, event_shape: Sequence[int], vocabulary: Size = 64, width: Size = 128, depth: Size = 3
    ):
        super().__init__()
        self.args = {"obs_dim": obs_dim, "event_shape": list(event_shape), "vocabulary": vocabulary}
        self.args |= {"width": width, "depth": depth}
        self.normalizer = Normalizer(obs_dim)
        self.net = MLPField(obs_dim + 3, event_shape, width, depth)
        self.event_shape, self.num_features, self.vocabulary = tuple(event_shape), obs_dim + 3, vocabulary
        self.scores = mlp([obs_dim, width, width, 2 * vocabulary])
        self.register_buffer("goals", torch.randn(vocabulary, 2))

    def scaled(self, goals: Tensor) -> Tensor:
        """Goals (..., 2) as the network reads them."""
        return (goals - self.goals.mean(0)) / self.goals.std(0).clamp(min=1e-6)

    def score(self, scene: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, V) of being near the demonstrator's and of being free, at scenes (N, F) as observed."""
        near, free = self.scores(self.normalizer(scene).to(self.goals.dtype)).chunk(2, -1)
        return near, free

    @torch.no_grad()
    def choose(self, scene: Tensor) -> Tensor:
        """(N, 2) the goal to take in scenes (N, F)."""
        near, free = self.score(scene)
        return self.goals[(NEAR * near.log_softmax(-1) + FREE * logsigmoid(free)).argmax(-1)]

    def asked(self, obs: Tree) -> tuple[Tensor, Tensor]:
        """(scene (N, F), goal (N, 2)) of observations: the goal that is told, else the one to take."""
        if not isinstance(obs, dict):
            return obs, self.choose(obs)
        return obs["obs"], obs[GOAL] if GOAL in obs else self.choose(obs["obs"])

    def encode(self, obs: Tree) -> Cond:
        """Scenes (N, F), or {"obs": scenes, "goal": (N, 2)}."""
        scene, goal = self.asked(obs)
        goal = self.scaled(goal.to(self.goals))
        told = [self.normalizer(scene).to(goal), goal, torch.ones_like(goal[:, :1])]
        return Cond({"pooled": torch.cat(told, 1)})

    def null(self, cond: Cond) -> Cond:
        """The same scene without a goal."""
        kept = cond["pooled"][:, :-3]
        return Cond({"pooled": torch.cat([kept, kept.new_zeros(len(kept), 3)], 1)})

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, *D)."""
        return self.net(x, t, dt, cond)


def nearness(goals: Tensor, true: Tensor) -> Tensor:
    """(N, V) softmax over the vocabulary (V, 2) of minus the squared distance, in metres, to true goals (N, 2)."""
    return (-torch.cdist(true, goals).square()).softmax(-1)


def score_loss(near: Tensor, free: Tensor, targets: Tensor, is_free: Tensor) -> Tensor:
    """Cross-entropy of `near` (N, V) against targets (N, V), less its least, and of `free` against bool (N, V)."""
    entropy = -(targets * targets.clamp(min=1e-30).log()).sum(-1)
    imitation = -(targets * near.log_softmax(-1)).sum(-1) - entropy
    sign = torch.where(is_free, 1.0, -1.0)
    return (imitation - logsigmoid(sign * free).mean(-1)).mean()
