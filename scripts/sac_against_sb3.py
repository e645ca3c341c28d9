"""SAC of stable-baselines3 on the same simulator, and both learners' optimiser steps per second; prints JSON.

    python scripts/sac_against_sb3.py train hopper --seed 0          50,176 environment steps, as robot_sac_gaussian
    python scripts/sac_against_sb3.py speed                          interleaved in one process, one thread

`train` has stable-baselines3's settings but for the ratio: 16 environments, 64 optimiser steps after 256 environment
steps, the first 4,096 without any; random actions for those, as its `learning_starts` has it. It is judged as `rlflow
eval` judges: 40 seeded episodes, the same start states, the mean action. `speed` gives both the same batch, layers and
activations, the Gaussian actor without LayerNorm in the critics, as theirs; and tells what a flow actor costs. Ours
alone: `rlflow bench off_policy`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from torch import Tensor

from rlflow import registry
from rlflow.bench.off_policy import bench_off_policy
from rlflow.envs.demos.experts import play, versions
from rlflow.envs.sb3 import Vectorised
from rlflow.envs.seeds import evaluation_seeds

NUM_ENVS, HORIZON, UPDATES, START = 16, 16, 64, 4096
EPISODES = 40


def sb3(env: str, seed: int, batch_size: int, width: int, start: int = START) -> SAC:
    """Their SAC on our simulator, at the ratio of the recipes."""
    world = Vectorised(registry.find("env", env)(NUM_ENVS, chunk=1, threads=1), seed * NUM_ENVS)
    layers = {"net_arch": [width, width]}
    more = {"learning_starts": start, "train_freq": (HORIZON, "step"), "gradient_steps": UPDATES, "device": "cpu"}
    return SAC("MlpPolicy", world, batch_size=batch_size, policy_kwargs=layers, seed=seed, **more)


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
    model, curve = sb3(env, seed, batch_size, 256), Curve(env, steps // 4)
    model.learn(steps, callback=curve)
    curve.add()
    spent = time.process_time() - begin - curve.away
    return {"seed": seed, "batch_size": batch_size, "cpu_seconds": round(spent, 1), "curve": curve.points}


def theirs(batch_size: int, width: int) -> Callable[[], Any]:
    """One optimiser step of stable-baselines3."""
    model = sb3("hopper", 0, batch_size, width, start=10**6)
    model.learn(NUM_ENVS * HORIZON)
    model.set_logger(Logger(None, []))
    return lambda: model.train(1, batch_size)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    learn = commands.add_parser("train")
    learn.add_argument("env")
    learn.add_argument("--seed", type=int, default=0)
    learn.add_argument("--steps", type=int, default=196 * NUM_ENVS * HORIZON)
    learn.add_argument("--batch-size", type=int, default=256)
    race = commands.add_parser("speed")
    race.add_argument("--batch-size", type=int, default=256)
    race.add_argument("--width", type=int, default=256)
    race.add_argument("--repeats", type=int, default=7)
    race.add_argument("--num", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "train":
        found = train(args.env, args.seed, args.steps, args.batch_size)
    else:
        others = {"stable_baselines3": theirs(args.batch_size, args.width)}
        found = bench_off_policy(args.batch_size, args.width, args.repeats, args.num, others=others)
    print(json.dumps(found | {"versions": versions("torch", "stable-baselines3")}))


if __name__ == "__main__":
    main()
