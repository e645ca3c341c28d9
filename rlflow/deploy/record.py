"""`rlflow demos record`: episodes of a run or a checkpoint as demonstrations, to learn from or to export."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rlflow.datasets.actions import bounds_of, step_env
from rlflow.deploy.runs import Asked, judging_config, load
from rlflow.deploy.steered import maker
from rlflow.envs.bounds import Bounds
from rlflow.envs.demos.dataset import Demos, Episode, write_demos
from rlflow.envs.demos.experts import play
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.types import Tree, tree_leaves, tree_map

ROWS = 32
"""Episodes that are played at once, and held."""


class InTurn:
    """A policy's actions one at a time: a chunk is made when the last one is used up, by the deployment sampler.

    A network with units of its own plans further than `length`, which are carried out.
    """

    def __init__(self, policy: FlowPolicy, bounds: Bounds | None, seed: int, length: int):
        self.policy, self.bounds, self.seed, self.length, self.made = policy, bounds, seed, length, 0
        self.field = maker(policy).field.unguided
        self.waiting: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, obs: Tree) -> Tensor:
        """(B, 1, *A) for observations (B, ...), as the environment clips them."""
        if not self.waiting:
            policy, key = self.policy, Key(self.seed, "record", self.made)
            seen = tree_map(lambda v: v.to(policy.device), obs)
            chunk = self._stretched(policy.select.act(policy, seen, policy.plan(), key, torch.arange(ROWS)).float())
            self.waiting, self.made = list(chunk.to(tree_leaves(obs)[0].device).split(1, 1)), self.made + 1
        action = self.waiting.pop(0)
        return action if self.bounds is None else self.bounds.inverse(self.bounds(action))

    def _stretched(self, chunk: Tensor) -> Tensor:
        """(B, H, *A) as a simulator takes them: in [-1, 1], or in its units where it has no bounds."""
        if not self.field.decodes_actions:
            return chunk
        made = self.field.decode(chunk)[:, : self.length]
        return made if self.bounds is None else self.bounds.inverse(made)


def record(name: str | Path, out: Path, asked: Asked, command: str = "") -> Demos:
    """Play one episode from each of the seeds `seed` to `seed + num - 1` and write them into the folder `out`."""
    num, seed, trust_code = asked.num or ROWS, asked.seed or 0, asked.trust_code
    config = judging_config(name, trust_code)
    if config.env.name == "prompt":
        raise ValueError(f"{name} makes images, demonstrations are of robots: rlflow sample draws them")
    if config.env.frame_stack > 1:
        raise ValueError(f"{name} sees env.frame_stack={config.env.frame_stack} frames, demonstrations hold one")
    if config.env.targets is not None:
        raise ValueError(f"{name} is told a return, which is not played here: rlflow eval asks for several")
    world = {"name": config.env.name, "settings": {k: v for k, v in config.env.settings.items() if k != "chunk"}}
    env = step_env(world, trust_code, ROWS)
    if env.action_shape[0] != 1:
        raise ValueError(
            f"{name}: {config.env.name} takes chunks of {env.action_shape[0]} actions only, not one by one"
        )
    policy = load(name, checkpoint=asked.checkpoint, weights=asked.weights, trust_code=trust_code)
    bounds, length = bounds_of(env), int(config.env.settings.get("chunk", 1))

    def episodes() -> Iterator[Episode]:
        for first in range(seed, seed + num, ROWS):
            yield from play(env, InTurn(policy, bounds, first, length), first)

    limit = 1.0 if bounds is None or bool((bounds.low.isfinite() & bounds.high.isfinite()).all()) else None
    made_by = {"command": command, "policy": str(name), "seed": seed, "fps": round(1 / env.step_seconds, 3)}
    return write_demos(out, itertools.islice(episodes(), num), world, made_by, bound=limit)
