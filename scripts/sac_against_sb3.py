"""SAC of stable-baselines3 on the same simulator; prints JSON. Its speed is a row of `rlflow bench peers`.

    python scripts/sac_against_sb3.py hopper --seed 0          50,176 environment steps, as robot_sac_gaussian

It has stable-baselines3's settings but for the ratio: 16 environments, 64 optimiser steps after 256 environment
steps, the first 4,096 without any; random actions for those, as its `learning_starts` has it. It is judged as `rlflow
eval` judges: 40 seeded episodes, the same start states, the mean action.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from rlflow import registry
from rlflow.bench.sac import HORIZON, NUM_ENVS, peer
from rlflow.envs.demos.experts import play, versions
from rlflow.envs.seeds import evaluation_seeds

EPISODES = 40


@torch.no_grad()
def judge(model: SAC, env: str, episodes: int = EPISODES) -> Tensor:
    """(N,) returns of seeded episodes by the mean action."""

    def act(obs: Tensor) -> Tensor:
        return torch.from_numpy(model.predict(obs.numpy(), deterministic=True)[0]).unsqueeze(1)

    world = registry.find("env", env)(episodes, chunk=1, threads=1)
    return torch.stack([e.reward.double().sum() for e in play(world, act, int(evaluation_seeds(0, 1)))])


class Curve(BaseCallback):
    """Judges every so many environment steps, between rollouts; its time is not counted."""

    def __init__(self, env: str, every: int):
        super().__init__()
        self.env, self.every, self.points, self.away = env, every, list[dict[str, float]](), 0.0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= (1 + len(self.points)) * self.every:
            self.add()

    def add(self) -> None:
        """One point."""
        begin = time.process_time()
        returns = judge(self.model, self.env)
        point = {"env_steps": self.num_timesteps, "return": round(float(returns.mean()), 1)}
        self.points.append(point)
        print(json.dumps(point), file=sys.stderr, flush=True)
        self.away += time.process_time() - begin


def train(env: str, seed: int, steps: int, batch_size: int) -> dict[str, Any]:
    """One run of theirs."""
    begin = time.process_time()
    model, curve = peer("stable_baselines3", env, seed, batch_size, 256), Curve(env, steps // 4)
    model.learn(steps, callback=curve)
    curve.add()
    spent = time.process_time() - begin - curve.away
    return {"seed": seed, "batch_size": batch_size, "cpu_seconds": round(spent, 1), "curve": curve.points}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=196 * NUM_ENVS * HORIZON)
    parser.add_argument("--batch-size", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = train(args.env, args.seed, args.steps, args.batch_size)
    print(json.dumps(found | {"versions": versions("torch", "stable-baselines3")}))


if __name__ == "__main__":
    main()
