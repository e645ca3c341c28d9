"""Spread heads for the adaptive solver (AdaFlow): learnt with the policy, or fitted to one that there is.

The head reads the policy's last hidden layer and gives it no gradient. Reinforcement learning moves what a policy
does and leaves the head behind, so its steps are stale: `rlflow pretrain robot_spread --from RUN` fits it anew, to what
the policy itself does in its environment.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rlflow.envs.base import VecEnv
from rlflow.envs.demos.dataset import Demos
from rlflow.flow.field import VelocityField
from rlflow.flow.grid import uniform_times
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.matching import MatchingLoss, SpreadLoss
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.squash import SQUASHES
from rlflow.models.io import load_field, read_config, save_field
from rlflow.models.mlp import MLPField
from rlflow.pretrain.cloning import Cloning, make_env
from rlflow.pretrain.matching import pretrain, report
from rlflow.types import Tree, tree_cat, tree_map


@dataclass(frozen=True)
class AdaptiveCloning(Cloning):
    """A policy of numbers that knows where its demonstrations part."""

    published: bool = False

    @property
    def asset(self) -> str:
        """Its folder."""
        return f"{self.env}_adaptive"

    @property
    def loss(self) -> MatchingLoss:
        """Of velocity and spread."""
        return SpreadLoss(self.published)

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """The release's spread."""
        super().add_options(parser)
        parser.add_argument("--published", action="store_true", help="the spread of a sum over the chunk: a larger eta")

    def make(self, out: Path, args: argparse.Namespace) -> dict[str, Any]:
        """As any, with the spread asked for."""
        return super(AdaptiveCloning, replace(self, published=args.published)).make(out, args)

    def options(self, args: argparse.Namespace) -> str:
        return " --published" if args.published else ""

    def network(self, demos: Demos) -> tuple[VelocityField, list[Parameter]]:
        """The usual one and a head."""
        return with_head(self.multilayer(demos)), []


def with_head(field: VelocityField) -> MLPField:
    """The same network with a spread head, the one it has or a fresh one; ValueError for others than MLPField."""
    if not isinstance(field, MLPField):
        raise ValueError(f"{type(field).__name__} cannot have a spread head, an mlp can")
    made = MLPField(**(field.args | {"spread": True}))
    made.load_state_dict(made.state_dict() | field.state_dict())
    return made


@torch.no_grad()
def played(policy: FlowPolicy, env: VecEnv, chunks: int, seed: int = 20_000) -> tuple[Tree, Tensor]:
    """(observations, samples (M, *D) before the squash) of a policy in its environment, `chunks` decisions a row."""
    obs, seen, done = env.reset(seed + torch.arange(env.num_envs)), [], []
    for step in range(chunks):
        seen.append(tree_map(torch.clone, obs))
        done.append(policy.sample(policy.encode(obs), key=Key(seed, "spread", outer=step)).final)
        obs = env.step(policy.squash(done[-1])).obs
    return tree_cat(seen), torch.cat(done)


def drawn(obs: Tree, action: Tensor, rows: int, seed: int) -> Iterator[tuple[Tensor, Tree]]:
    """Endless batches of pairs."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        some = torch.randint(len(action), (rows,), generator=rng)
        yield action[some], tree_map(lambda v: v[some], obs)  # noqa: B023


def fit_head(field: MLPField, obs: Tree, action: Tensor, steps: int, seed: int = 0, rows: int = 512) -> MLPField:
    """`field` with its spread head fitted to the pairs, and nothing else of it changed."""
    field.requires_grad_(False)
    field.spread_head.requires_grad_(True)
    return pretrain(
        field,
        drawn(obs, action, rows, seed),
        steps=steps,
        lr=3e-3,
        drop=0.0,
        times=uniform_times,
        loss=SpreadLoss(),
        seed=seed,
        autocast=False,
        progress=report(steps, every=100),
    )


@dataclass(frozen=True)
class SpreadFit:
    """The spread head of a policy that there is, on its own actions."""

    name: str = "robot_spread"
    steps: int = 500
    rows: int = 64  # of the environment
    chunks: int = 50

    @property
    def asset(self) -> str:
        """Its folder."""
        return "adaptive"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Whose head."""
        parser.add_argument("--from", dest="source", required=True, help="checkpoint, or the folder model of a run")
        parser.add_argument("--trust-code", action="store_true", help="run an environment outside rlflow")

    def make(self, out: Path, args: argparse.Namespace) -> dict[str, Any]:
        """Play, fit and save; returns config.json's "made_by"."""
        source = args.source
        about = read_config(source).get("judged_by", {})
        if about.get("env", {}).get("name", "prompt") == "prompt":
            raise ValueError(f"--from: {source} does not name the simulator that it acts in")
        if about["env"].get("frame_stack", 1) > 1:
            raise ValueError(f"--from: {source} sees stacked frames, which are not played here")
        torch.manual_seed(args.seed)
        field, env = with_head(load_field(source, args.trust_code)), make_env(about["env"], self.rows, args.trust_code)
        told = about.get("policy", {}) | about.get("eval", {})
        squash = SQUASHES[told.get("squash", "identity")]()
        policy = FlowPolicy(field, FlowSDE(), num_steps=told["num_steps"], squash=squash)
        fitted = fit_head(field, *played(policy, env, self.chunks), args.steps, args.seed)
        made_by = {
            "command": f"rlflow pretrain {self.name} --from {source} --steps {args.steps} --seed {args.seed}",
            "seed": args.seed,
            "steps": args.steps,
        }
        save_field(fitted, out, made_by, about)
        return made_by


ADAPTIVE: dict[str, Cloning | SpreadFit] = {
    "robot_bc_routes_adaptive": AdaptiveCloning(
        "robot_bc_routes_adaptive", "toy_routes", steps=1500, num_steps=10, chunk=2, rows=256, lr=2e-3, average=0.99
    ),
    "robot_spread": SpreadFit(),
}
