"""Success and network calls of an action by solver, of checkpoints with a spread head, and a control of AdaFlow.

    python scripts/adaptive_table.py CHECKPOINT ... [--eta X] [--num N] [--steps K ...]

The control gives every step of a row the spread that another row, at another place and denoising step, had in the same
evaluation (first steps those of first steps, so the calls stay about as many). Prints JSON: one value a checkpoint.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlflow.evaluation.episodes import EpisodeEvaluator
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import Adaptive, Euler, Memory, Solver, Velocity
from rlflow.flow.squash import SQUASHES
from rlflow.models.io import load_field, read_config
from rlflow.pretrain.cloning import make_env
from rlflow.types import Cond

MOST = 10
"""Steps of the adaptive solver."""


class Told(Adaptive):
    """The solver, which keeps the spreads it is told: those of first steps, and those of later ones."""

    def __init__(self, eta: float):
        super().__init__(eta)
        self.kept: tuple[list[Tensor], list[Tensor]] = ([], [])

    def __call__(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, cond: Cond, memory: Memory
    ) -> tuple[Tensor, Memory]:
        late = int(memory is not None)

        def asked(x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
            told = velocity(x, t, dt, cond)
            return torch.cat([told[:, :-1], self.spread(told[:, -1], late).unsqueeze(1)], 1)

        return super().__call__(asked, x, t, t_next, cond, memory)

    def spread(self, log_spread: Tensor, late: int) -> Tensor:
        """(N,) that is used."""
        self.kept[late].append(log_spread)
        return log_spread


class Dealt(Told):
    """The control: spreads of `other`'s evaluation, dealt at random."""

    def __init__(self, other: Told):
        super().__init__(other.eta)
        self.pools, self.rng = [torch.cat(kept) for kept in other.kept], torch.Generator().manual_seed(0)

    def spread(self, log_spread: Tensor, late: int) -> Tensor:
        """(N,) of other rows."""
        pool = self.pools[late]
        return pool[torch.randint(len(pool), log_spread.shape, generator=self.rng)]


def judged(checkpoint: str, solver: Solver, num_steps: int, num: int) -> dict[str, float]:
    """Means of seeded episodes."""
    about = read_config(checkpoint)["judged_by"]
    told = about["policy"] | about.get("eval", {})
    squash = SQUASHES[told.get("squash", "identity")]()
    policy = FlowPolicy(load_field(checkpoint), FlowSDE(), num_steps=num_steps, squash=squash)
    make = partial(make_env, about["env"])
    return EpisodeEvaluator(policy, make, num=num, solver=solver, rows_per_call=num, video=0)().means()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--eta", type=float, default=0.2)
    parser.add_argument("--num", type=int, default=500, help="episodes")
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 2, 4, MOST])
    args = parser.parse_args()
    told: dict[str, dict[str, list[Any]]] = {}
    for checkpoint in args.checkpoints:
        adaptive = Told(args.eta)
        found = {f"K={k}": judged(checkpoint, Euler(), k, args.num) for k in args.steps}
        found[f"adaptive {args.eta:g}"] = judged(checkpoint, adaptive, MOST, args.num)
        found["its control"] = judged(checkpoint, Dealt(adaptive), MOST, args.num)
        for way, means in found.items():
            for name, value in means.items():
                told.setdefault(way, {}).setdefault(name, []).append(round(value, 3))
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
