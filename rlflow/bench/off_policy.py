"""What an optimiser step of SAC costs: critics, actor and temperature, of a Gaussian actor and of flows, on Hopper.

Contenders take turns in one process, and are compared in CPU seconds: a machine that does other things as well slows
all alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from rlflow.bench.stopwatch import Times
from rlflow.config import recipes
from rlflow.rl.off_policy.sac import SAC
from rlflow.train.build import make_parts

Learner = Callable[[], Any]
"""One optimiser step."""
ACTORS = {
    "gaussian": ["policy.kernel.width=64", "algorithm.critic_norm=false"],
    "gaussian_bfloat16": ["policy.kernel.width=64", "algorithm.critic_norm=false", "policy.precision=bfloat16"],
    "flow_g": [],
    "flow_t": [],
    "flow_plain": [],
}
"""What they differ in from their recipes, robot_sac_*. The Gaussian's critics have no LayerNorm: so have its peers'."""


def learner(actor: str, batch_size: int = 256, width: int = 256) -> Learner:
    """One optimiser step of robot_sac_<actor>, on a replay of one iteration."""
    name = actor.removesuffix("_bfloat16")
    own = [] if name == "flow_t" else [f"policy.field.width={width}"]  # a decoder's width is another thing
    sizes = [*own, f"algorithm.critic_width={width}", f"algorithm.batch_size={batch_size}"]
    parts = make_parts(recipes.load(f"robot_sac_{name}", [*ACTORS[actor], *sizes]))
    sac = parts.algorithm
    assert isinstance(sac, SAC)
    sac.update(parts.collector.collect(0))  # none is due yet
    return sac.step


def bench_off_policy(
    batch_size: int = 256,
    width: int = 256,
    repeats: int = 7,
    num: int = 20,
    actors: tuple[str, ...] = tuple(ACTORS),
    others: Mapping[str, Learner] | None = None,
) -> dict[str, Any]:
    """Steps per CPU second: the median of `repeats` turns of `num` steps each; about a minute.

    With `others`, steps of other libraries that take their turns too, also how many times as fast as the first of them.
    """
    contenders = dict(others or {}) | {name: learner(name, batch_size, width) for name in actors}
    times = Times()
    for turn in range(repeats + 1):
        for name, step in contenders.items():
            times.run(name if turn else f"warm-up {name}", _several(step, num), turn)
    seconds = {name: times.median(name, "cpu") / num for name in contenders}
    out: dict[str, Any] = {
        "batch_size": batch_size,
        "width": width,
        "threads": torch.get_num_threads(),
        "load_1min": os.getloadavg()[0],
        "steps_per_cpu_second": {name: round(1 / s, 1) for name, s in seconds.items()},
    }
    if others:
        base = seconds[next(iter(others))]
        out["times_as_fast"] = {name: round(base / s, 2) for name, s in seconds.items()}
    return out


def _several(step: Learner, num: int) -> Callable[[int], None]:
    def steps(turn: int) -> None:
        for _ in range(num):
            step()

    return steps
