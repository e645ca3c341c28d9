"""Network calls of an action by where the point mass of the two routes is, under AdaFlow. Draws docs/calls.png.

    python scripts/draw_calls.py CHECKPOINT [--eta X] [--num-steps K] [--episodes N] [--out FILE]

CHECKPOINT is made by `rlflow pretrain robot_bc_routes_adaptive`. Colour: the mean number of calls of sixteen actions at
each place; lines: episodes of the policy; prints JSON of the means on the way and over the whole picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Circle

from rlflow.envs.simulators.toy import RoutesSim, ToyRoutes
from rlflow.flow.field import VelocityField
from rlflow.flow.solvers import Adaptive, Memory
from rlflow.models.io import load_field

MANY, FINE = 16, 61
WIDE, HIGH = 1.25, 1.0
"""Half sides of the picture."""


def sampled(field: VelocityField, solver: Adaptive, num_steps: int, obs: Tensor) -> tuple[Tensor, Tensor]:
    """(actions (N, *D), network calls (N,)) of one chain at each place (N, 2)."""
    x, calls, memory = torch.randn(len(obs), *field.event_shape), torch.zeros(len(obs)), None
    cond = field.encode(obs)
    for k in range(num_steps):
        t = torch.full((len(obs),), k / num_steps)
        known: Memory = t if memory is None else memory
        calls += known < 1
        x, memory = solver(field.with_spread, x, t, torch.full_like(t, (k + 1) / num_steps), cond, memory)
    return x, calls


def played(field: VelocityField, solver: Adaptive, num_steps: int, num: int) -> tuple[Tensor, Tensor]:
    """(places (T, N, 2), calls (T, N)) of first episodes, nan from their end on."""
    env = ToyRoutes(num)
    obs, over, places, spent = env.reset(10_000 + torch.arange(num)), torch.zeros(num, dtype=torch.bool), [], []
    for _ in range(env.horizon):
        action, calls = sampled(field, solver, num_steps, obs)
        gone = torch.where(over, torch.nan, 1.0)
        places.append(obs * gone[:, None])
        spent.append(calls * gone)
        step = env.step(action)
        obs, over = step.obs, over | step.ended
    return torch.stack(places), torch.stack(spent)


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--eta", type=float, default=0.2)
    parser.add_argument("--num-steps", type=int, default=10)
    parser.add_argument("--episodes", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("docs/calls.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    field, solver = load_field(args.checkpoint), Adaptive(args.eta)
    x, y = torch.linspace(-WIDE, WIDE, FINE), torch.linspace(-HIGH, HIGH, FINE)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
    calls = sampled(field, solver, args.num_steps, grid.repeat(MANY, 1))[1].view(MANY, FINE, FINE).mean(0)
    places, spent = played(field, solver, args.num_steps, args.episodes)
    figure, axis = plt.subplots(figsize=(6.4, 4.6))
    edges = (-WIDE, WIDE, -HIGH, HIGH)
    shown = axis.imshow(calls, origin="lower", extent=edges, cmap="viridis", vmin=1, interpolation="bilinear")
    figure.colorbar(shown, ax=axis, label=f"network calls of an action, at most {args.num_steps}", shrink=0.8)
    axis.plot(places[..., 0], places[..., 1], color="white", lw=0.7, alpha=0.8)
    axis.add_patch(Circle((0, 0), RoutesSim.RADIUS, facecolor="#262a30"))
    axis.plot(1, 0, marker="*", color="#c0392b", ms=11)
    axis.set(xlim=(-WIDE, WIDE), ylim=(-HIGH, HIGH), aspect="equal", xticks=[], yticks=[])
    figure.tight_layout(pad=0.4)
    figure.savefig(args.out, dpi=100, metadata={"Software": ""})
    near = spent[places[..., 0] < -0.7].nanmean()
    past = spent[places[..., 0] > 0].nanmean()
    told = {"before the disc": near, "past its middle": past, "on the way": spent.nanmean(), "everywhere": calls.mean()}
    print(json.dumps({name: round(float(value), 2) for name, value in told.items()}))


if __name__ == "__main__":
    main()
