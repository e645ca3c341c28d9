"""Optimiser steps of SAC: the recipes' beside those of stable-baselines3, on PyTorch, and of sbx, on JAX.

All have the same batch, layers and activations, on the same simulator: the Gaussian actor without LayerNorm in the
critics is theirs; the flow actors tell what a flow costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlflow import registry
from rlflow.assembly.parts import make_parts
from rlflow.config import recipes
from rlflow.envs.sb3 import Vectorised
from rlflow.rl.off_policy.sac import SAC

NUM_ENVS, HORIZON, UPDATES, START = 16, 16, 64, 4096
"""Of the recipes: 64 optimiser steps after 256 environment steps, the first 4,096 without any."""
OURS = {
    "rlflow_gaussian": ["policy.kernel.width=64", "algorithm.critic_norm=false"],
    "rlflow_gaussian_bfloat16": ["policy.kernel.width=64", "algorithm.critic_norm=false", "policy.precision=bfloat16"],
    "rlflow_flow_g": [],
    "rlflow_flow_g_bfloat16": ["policy.precision=bfloat16"],
}
ABOUT = {
    "rlflow_gaussian": "SAC, Gaussian actor",
    "rlflow_gaussian_bfloat16": "SAC, Gaussian actor, bfloat16 products",
    "rlflow_flow_g": "SAC Flow-G",
    "rlflow_flow_g_bfloat16": "SAC Flow-G, bfloat16 products",
}


def peer(library: str, env: str, seed: int, batch_size: int, width: int, start: int = START) -> Any:
    """SAC of "stable_baselines3" or "sbx" on our simulator, at the ratio of the recipes; ImportError without it."""
    if library == "sbx":
        from sbx import SAC
    else:
        from stable_baselines3 import SAC
    world = Vectorised(registry.find("env", env)(NUM_ENVS, chunk=1, threads=1), seed * NUM_ENVS)
    layers = {"net_arch": [width, width]}
    more = {"learning_starts": start, "train_freq": (HORIZON, "step"), "gradient_steps": UPDATES, "device": "cpu"}
    return SAC("MlpPolicy", world, batch_size=batch_size, policy_kwargs=layers, seed=seed, **more)


def theirs(library: str, batch_size: int = 256, width: int = 256) -> Callable[[int], Any]:
    """So many optimiser steps of a peer."""
    from stable_baselines3.common.logger import Logger

    model = peer(library, "hopper", 0, batch_size, width, start=10**6)
    model.learn(NUM_ENVS * HORIZON)
    model.set_logger(Logger(None, []))
    return lambda num: model.train(num, batch_size)


def ours(name: str, batch_size: int = 256, width: int = 256) -> Callable[[int], Any]:
    """So many optimiser steps of a recipe, on a replay of one iteration."""
    recipe = f"robot_sac_{name.removeprefix('rlflow_').removesuffix('_bfloat16')}"
    more = [f"policy.field.width={width}", f"algorithm.critic_width={width}", f"algorithm.batch_size={batch_size}"]
    parts = make_parts(recipes.load(recipe, [*OURS[name], *more]))
    sac = parts.algorithm
    assert isinstance(sac, SAC)
    sac.update(parts.collector.collect(0))  # none is due yet
    step = sac.step

    def steps(num: int) -> None:
        for _ in range(num):
            step()

    return steps
