"""Scenes of ToyDrive with the candidates of a policy that has goals, and the one that is taken. Draws docs/drive.png.

    python scripts/draw_drive.py CHECKPOINT [--scenes N] [--out FILE]

CHECKPOINT is made by `rlflow pretrain robot_goal_drive`. Grey: the others now, and as outlines after four seconds;
thin lines: sixteen manoeuvres of one denoising step; red: the one that ends nearest to the goal, the star.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from rlflow.envs.simulators.drive import DT, LONG, STEPS, WIDE, ToyDrive, moved, scene, trajectory
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.models.io import load_field
from rlflow.pretrain.goals import MANY, NearestGoal

BLUE, RED, GREY = "#3b6ea8", "#c0392b", "#777777"


def car(axis: Axes, x: float, y: float, **look: object) -> None:
    """A car seen from above."""
    axis.add_patch(Rectangle((x - LONG / 2, y - WIDE / 2), LONG, WIDE, lw=0.8, **look))


def draw(axis: Axes, obs: Tensor, points: Tensor, best: int, goal: Tensor) -> None:
    """One scene (21,) with candidates (n, H, 2), the number of the one taken and its goal (2,)."""
    for edge in (-5.25, -1.75, 1.75, 5.25):
        axis.axhline(edge, color="#999999", lw=1, ls="-" if abs(edge) > 2 else (0, (6, 6)))
    mine, boxes = (v[0] for v in scene(obs.unsqueeze(0)))
    for x, y, _ in moved(boxes, DT * STEPS).tolist():
        car(axis, x, y, facecolor="none", edgecolor=GREY)
    for x, y, _ in boxes.tolist():
        car(axis, x, y, facecolor="#bbbbbb", edgecolor=GREY)
    car(axis, 0.0, float(mine[1]), facecolor=BLUE, edgecolor=BLUE)
    for line in points:
        axis.plot(line[:, 0], line[:, 1], color=BLUE, lw=0.6, alpha=0.6)
    axis.plot(points[best][:, 0], points[best][:, 1], color=RED, lw=2)
    axis.plot(*goal.tolist(), marker="*", color=RED, ms=9)
    axis.set(xlim=(-8, 62), ylim=(-6, 6), xticks=[], yticks=[], aspect="equal")


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("docs/drive.png"))
    args = parser.parse_args()
    field = load_field(args.checkpoint)
    policy, scorer = FlowPolicy(field, FlowSDE(), num_steps=1), NearestGoal(field)
    obs = ToyDrive(args.scenes).reset(10_000 + torch.arange(args.scenes))
    rows = torch.arange(args.scenes * MANY)
    made = policy.sample(policy.encode(obs), key=Key(0, "draw"), row_ids=rows, copies=MANY).final
    made = made.unflatten(0, (-1, MANY))
    points, best, goals = trajectory(obs, made), scorer(made, obs).argmax(1), field.choose(obs)
    figure, axes = plt.subplots(args.scenes, 1, figsize=(8, 1.45 * args.scenes), squeeze=False)
    for row, axis in enumerate(axes[:, 0]):
        draw(axis, obs[row], points[row], int(best[row]), goals[row])
    figure.tight_layout(pad=0.4)
    figure.savefig(args.out, dpi=100, metadata={"Software": ""})


if __name__ == "__main__":
    main()
