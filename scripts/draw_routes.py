"""Two equally good routes: FPO and a Gaussian policy, taught and trained alike. Draws docs/routes.png, prints JSON.

    python scripts/draw_routes.py [--clone N] [--iterations N] [--seeds N] [--out DIR]

Both are cloned from demonstrations of which half go above the disc and half below (`--clone` steps, 0: from scratch),
then tuned by `PolicyGradient` with the same environment, critic, number of samples and learning rate. The Gaussian one
is a flow of one step whose velocity m(obs) - x leads from any x to the mean, with the learned noise of ReinFlow
around it. FPO is tuned a second time with a KL term, .1 E|v - v_ref|^2. Episodes are played from (-1, 0), as near to
the one route as to the other, as each policy samples while it trains, and the Gaussian one without its noise too.
About four minutes of one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle

from rlflow.envs.seeds import first_seed
from rlflow.envs.simulators.toy import RoutesSim, ToyRoutes, routes_command
from rlflow.flow.kernels import FlowSDE, LearnedNoise
from rlflow.flow.matching import cfm_loss
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import All, NoSteps, Steps
from rlflow.models.gaussian import GaussianField
from rlflow.models.mlp import MLPField
from rlflow.rl.advantages import GAE
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.rl.learners.regularizers import KL
from rlflow.rl.likelihoods.base import Likelihood
from rlflow.rl.likelihoods.cfm import CFMLikelihood
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.objectives.clip import Clip
from rlflow.rl.optim import AdamW

ROWS, SHAPE, GAMMA = 256, ToyRoutes.action_shape, 0.99
INK, ABOVE, BELOW = "#262a30", "#009e73", "#d97f2b"


@dataclass
class Made:
    """A policy, how it is sampled and scored, its clip and its KL term."""

    policy: FlowPolicy
    steps: Steps
    likelihood: Likelihood
    clip: float
    beta: float = 0.0


def fpo(beta: float = 0.0) -> Made:
    """Ten ODE steps, eight draws of the matching loss."""
    policy = FlowPolicy(MLPField(2, SHAPE, width=64), FlowSDE(), num_steps=10)
    return Made(policy, NoSteps(), CFMLikelihood(8, "eps"), 0.05, beta)


def gaussian() -> Made:
    """A mean and a learned std of .1 to 1 for each number of the action."""
    policy = FlowPolicy(GaussianField(2, SHAPE), LearnedNoise(2, SHAPE, 0.1, 1.0), num_steps=1)
    return Made(policy, All(), ChainLikelihood("sum", joint=True), 0.2)


POLICIES: dict[str, Callable[[], Made]] = {"FPO": fpo, "FPO and KL": lambda: fpo(0.1), "Gaussian": gaussian}


def demonstrations(rows: int = 400) -> tuple[Tensor, Tensor]:
    """(observations (M, 2), chunks (M, 2, 2)) of the expert, half of the episodes on either side."""
    sim, side = RoutesSim(rows, 2, 24), torch.ones(rows)
    side[::2] = -1
    position = sim.reset(torch.arange(rows), torch.ones(rows, dtype=torch.bool)).clone()
    alive, seen, done = torch.ones(rows, dtype=torch.bool), [], []
    for _ in range(6):
        chunk, before = [], position
        for _ in range(2):
            chunk.append(routes_command(position, side))
            position = position + RoutesSim.SPEED * chunk[-1]
        seen.append(before[alive])
        done.append(torch.stack(chunk, 1)[alive])
        alive = alive & ((position - torch.tensor([1.0, 0.0])).norm(dim=1) > RoutesSim.NEAR)
    return torch.cat(seen), torch.cat(done)


def clone(policy: FlowPolicy, steps: int) -> None:
    """Flow matching; at t = 0 alone it is the Gaussian's least squares."""
    obs, chunk = demonstrations()
    adam = torch.optim.Adam(policy.field.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(obs), (256,))
        t = torch.zeros(256) if policy.num_steps == 1 else torch.rand(256)
        loss = cfm_loss(policy.field, chunk[rows], policy.encode(obs[rows]), torch.randn(256, *SHAPE), t).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()


def tune(made: Made, seed: int, iterations: int) -> None:
    """Reinforcement learning."""
    groups, env = Groups(ROWS, 1, first=first_seed(seed)), ToyRoutes(ROWS, gamma=GAMMA)
    policy, likelihood = made.policy, made.likelihood
    walker = Collector(env, policy, likelihood, made.steps, groups, seed=seed, horizon=env.horizon, rows_per_call=ROWS)
    learner = PolicyGradient(
        policy,
        likelihood,
        GAE(GAMMA),
        groups,
        objective=Clip(likelihood, made.clip),
        epochs=4,
        num_minibatches=4,
        micro_batch=8192,
        kl=KL(made.beta),
        optimizer=AdamW(lr=5e-4),
        seed=seed,
    )
    for iteration in range(iterations):
        learner.update(walker.collect(iteration))


@torch.no_grad()
def play(policy: FlowPolicy, steps: Steps, rows: int = 200) -> tuple[Tensor, Tensor]:
    """(paths (steps, rows, 2) that stay where an episode ended, success (rows,)) from (-1, 0)."""
    sim, ids = RoutesSim(rows, 2, 24), torch.arange(rows)
    sim.state["position"] = torch.tensor([-1.0, 0.0]).repeat(rows, 1)
    paths, over, success = [sim.state["position"].clone()], torch.zeros(rows, dtype=torch.bool), torch.zeros(rows)
    for outer in range(12):
        cond, plan = policy.encode(sim.observe()), steps(0, policy.grid(policy.num_steps), ids)
        action = policy.sample(cond, plan, key=Key(0, "routes", outer=outer), row_ids=ids).final
        for part in action.clamp(-1, 1).unbind(1):
            before = sim.state["position"].clone()
            out = sim.advance(part)
            sim.state["position"] = torch.where(over[:, None], before, sim.state["position"])
            success = torch.where(over, success, out.info["success"])
            over = over | out.terminated
            paths.append(sim.state["position"].clone())
    return torch.stack(paths), success


def sides(paths: Tensor, success: Tensor) -> dict[str, float]:
    """Shares of all episodes that reached the goal above the disc and below it."""
    height = paths[..., 1].gather(0, paths[..., 0].abs().argmin(0, keepdim=True))[0]
    there = success > 0
    shares = {"above": there & (height > 0), "below": there & (height < 0)}
    return {side: round(float(share.float().mean()), 3) for side, share in shares.items()}


def panel(axes: Axes, paths: Tensor, found: dict[str, float], title: str) -> None:
    """The paths of 60 episodes."""
    axes.add_patch(Circle((0, 0), RoutesSim.RADIUS, color="#d5d9de", lw=0))
    axes.plot(*paths[0, 0], "o", color=INK, ms=4)
    axes.plot(1, 0, "*", color=INK, ms=9)
    for path in paths[:, :60].unbind(1):
        side = path[path[:, 0].abs().argmin(), 1] > 0
        axes.plot(path[:, 0], path[:, 1], color=ABOVE if side else BELOW, lw=0.7, alpha=0.5)
    axes.set(xlim=(-1.25, 1.25), ylim=(-1.15, 1.15), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(f"above {found['above']:.2f}, below {found['below']:.2f}", fontsize=9, color=INK)
    for spine in axes.spines.values():
        spine.set_color("#c9ced4")


def main() -> None:
    """Train, play, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clone", type=int, default=1500)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figure, grid = plt.subplots(4, args.seeds, figsize=(2.7 * args.seeds, 10.6), squeeze=False)
    for i, name in enumerate(POLICIES):
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            made = POLICIES[name]()
            clone(made.policy, args.clone)
            before = sides(*play(made.policy, made.steps))
            tune(made, seed, args.iterations)
            shown = {f"{name}, seed {seed}": made.steps}
            shown |= {"its mean alone": NoSteps()} if name == "Gaussian" else {}
            told = {"policy": name, "seed": seed, "cloned": before}
            for row, (title, plan) in enumerate(shown.items(), i):
                paths, success = play(made.policy, plan)
                told["tuned" if row == i else "mean alone"] = found = sides(paths, success)
                panel(grid[row, seed], paths, found, title)
            print(json.dumps(told), flush=True)
    figure.tight_layout()
    figure.savefig(args.out / "routes.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
