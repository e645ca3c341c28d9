"""GoalFlow on ToyDrive: manoeuvres cloned given where they end, goals scored, and what that is worth on new scenes.

The goal alone is dropped from a third of the rows. The velocity's loss is L2: its optimum is the mean that carries
noise to data. The release trains an L1 loss, whose optimum is the conditional median; that is `--loss l1`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from rlflow.envs.base import VecEnv
from rlflow.envs.demos.dataset import Chunks, Demos
from rlflow.envs.simulators.drive import STEPS, free, trajectory
from rlflow.flow.field import VelocityField
from rlflow.flow.guidance import CFG
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.matching import Coupling, MatchingLoss, cfm_loss, on_path
from rlflow.flow.noise import Key
from rlflow.flow.path import at_least_float
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.select import BestOf, Select
from rlflow.models.goals.goal import GOAL, GoalField, kmeans, nearness, score_loss
from rlflow.pretrain.cloning import Cloning, demos_of
from rlflow.pretrain.matching import learning_rate_factor
from rlflow.types import Cond, Tree

SCENES = 512
"""Held-out ones that a policy is judged on."""
MANY = 16
"""Candidates of a choice."""


def l1_loss(field: VelocityField, x_1: Tensor, cond: Cond, x_0: Tensor, t: Tensor) -> Tensor:
    """Absolute velocity error (N,), as GoalFlow's release: the optimum is a median, which carries no law to another."""
    error = on_path(field, x_1, cond, x_0, t) - (at_least_float(x_1) - at_least_float(x_0))
    return error.abs().flatten(1).mean(1)


LOSSES: dict[str, MatchingLoss] = {"l2": cfm_loss, "l1": l1_loss}


class NearestGoal:
    """A scorer of manoeuvres: minus the distance, in metres, from where one ends to the goal."""

    def __init__(self, field: VelocityField):
        if not isinstance(field, GoalField):
            raise ValueError(f"nearest_goal needs a policy that has goals, and this is a {type(field).__name__}")
        self.field = field

    def __call__(self, samples: Tensor, asked: Any) -> Tensor:
        """(N, n) of samples (N, n, H, 2)."""
        scene, goal = self.field.asked(asked)
        return -(trajectory(scene, samples)[:, :, -1] - goal.unsqueeze(1)).norm(dim=-1)


@dataclass(frozen=True)
class Manoeuvres(Chunks):
    """Whole episodes, with the point where each ends as its goal."""

    def __getitem__(self, index: Tensor) -> tuple[Tree, Tensor]:
        """{"obs": (N, F), "goal": (N, 2)} and commands (N, H, 2)."""
        obs, action = super().__getitem__(index)
        return {"obs": obs, GOAL: trajectory(obs, action.unsqueeze(1))[:, 0, -1]}, action


@dataclass(frozen=True)
class GoalCloning(Cloning):
    """The flow of manoeuvres and the scores of goals."""

    drop: float = 1 / 3
    judged: int = SCENES
    objective: str = "l2"
    vocabulary: int = 64
    score_steps: int = 1500

    @property
    def asset(self) -> str:
        """Its folder."""
        return "drive_goal"

    @property
    def loss(self) -> MatchingLoss:
        """Of the velocity."""
        return LOSSES[self.objective]

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """L1 by name only."""
        super().add_options(parser)
        parser.add_argument("--loss", choices=LOSSES, default="l2")

    def make(self, out: Path, args: argparse.Namespace) -> dict[str, Any]:
        """As any, by the loss asked for."""
        demos = demos_of(self.env, Path(args.demos), num=self.num_demos)
        return replace(self, objective=args.loss).make_of(demos, out, args)

    def options(self, args: argparse.Namespace) -> str:
        return "" if args.loss == "l2" else f" --loss {args.loss}"

    def chunks(self, demos: Demos) -> Chunks:
        return Manoeuvres(demos, demos.chunks(self.chunk).starts, self.chunk)

    def network(self, demos: Demos) -> tuple[VelocityField, list[Parameter]]:
        """A multilayer perceptron over scene and goal, with the vocabulary of where the demonstrations end."""
        train = self.chunks(demos.split()[0])
        goals = cast(dict[str, Tensor], train[torch.arange(len(train))][0])[GOAL]
        field = GoalField(demos.moments.shape[1], (self.chunk, *demos.action_shape), self.vocabulary)
        field.normalizer.moments.copy_(demos.moments)
        field.goals.copy_(kmeans(goals, self.vocabulary))
        return field, []

    def clone(self, demos: Demos, steps: int, seed: int, coupling: Coupling) -> tuple[VelocityField, float]:
        """The flow, then the scores."""
        field, loss = super().clone(demos, steps, seed, coupling)
        train = self.chunks(demos.split()[0])
        fit_scores(cast(GoalField, field), train, self.score_steps, seed)
        return field, loss

    def judge(self, field: VelocityField, env: VecEnv) -> dict[str, Any]:
        """Collisions, metres gained, distance to the goal: by steps, without a goal, with other scenes' goals."""
        goal_field, told = cast(GoalField, field), {}
        choices: dict[str, tuple[VelocityField, int, Select]] = {
            "no goal, K = 10": (CFG(field, 0.0), 10, Select()),
            **{f"goal, K = {k}": (field, k, Select()) for k in (1, 4, 10)},
            f"goal, K = 1, best of {MANY}": (field, 1, BestOf(MANY, NearestGoal(field))),
            f"goal, K = 4, best of {MANY}": (field, 4, BestOf(MANY, NearestGoal(field))),
        }
        for name, (made, k, select) in choices.items():
            told[name] = manoeuvre(goal_field, made, env, k, select)
        told["other scenes' goals, K = 4"] = manoeuvre(goal_field, field, env, 4, Select(), permuted=True)
        return told


def fit_scores(field: GoalField, chunks: Chunks, steps: int, seed: int = 0, rows: int = 256) -> None:
    """Fit the two scores in place, on whole episodes."""
    obs, _ = chunks[torch.arange(len(chunks))]
    scenes, goals = obs["obs"], obs[GOAL]
    targets, is_free = nearness(field.goals, goals), free(scenes, field.goals)
    optimizer = torch.optim.AdamW(field.scores.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: learning_rate_factor(i, steps))
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(len(scenes), (rows,), generator=rng)
        near, clear = field.score(scenes[some])
        loss = score_loss(near, clear, targets[some], is_free[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def manoeuvre(
    field: GoalField, sampled: VelocityField, env: VecEnv, num_steps: int, select: Select, permuted: bool = False
) -> dict[str, float]:
    """What one manoeuvre in each of the environment's scenes comes to; `permuted` tells each the next scene's goal."""
    policy = FlowPolicy(sampled, FlowSDE(), num_steps=num_steps)
    scenes = env.reset(10_000 + torch.arange(env.num_envs))
    wanted = field.choose(scenes)
    goal = wanted.roll(1, 0) if permuted else wanted
    obs = {"obs": scenes, GOAL: goal}
    key, rows = Key(10_000, "judge"), torch.arange(env.num_envs)
    action = select(policy, policy.encode(obs), obs, policy.plan(), key, rows)
    ends, step = trajectory(scenes, action.unsqueeze(1))[:, 0, -1], env.step(action)
    return {
        "collisions": round(float(step.terminated.float().mean()), 3),
        "progress": round(float(ends[:, 0].mean()), 1),
        "goal_error": round(float((ends - goal).norm(dim=-1).mean()), 2),
    }


GOALS: dict[str, GoalCloning] = {
    "robot_goal_drive": GoalCloning("robot_goal_drive", "toy_drive", steps=3000, chunk=STEPS, rows=256, num_demos=4000)
}
