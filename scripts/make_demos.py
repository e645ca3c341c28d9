"""Demonstrations of a task by its expert, which --train makes anew with stable-baselines3, or by its scripted oracle.

    python scripts/make_demos.py hopper                      100 episodes of the shipped expert into demos/hopper
    python scripts/make_demos.py hopper --train --seed 1     a new expert first, into rlflow/assets/experts
    python scripts/make_demos.py cube_single --noise 0.2     OGBench's oracle, with noise on its actions
    python scripts/make_demos.py tabletop                    the scripted expert of the tabletop

Training stops as soon as the mean return is "medium": Hopper 1,000 to 1,600, Walker2d 1,000 to 2,000, HalfCheetah
2,500 to 4,500. The same seed gives the same data on one machine.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from rlflow import registry
from rlflow.envs.demos.demonstrators import DEMONSTRATORS, make_demos
from rlflow.envs.demos.experts import GaussianExpert, embedded_expert, versions
from rlflow.envs.sb3 import Vectorised

NUM_ENVS = 32
WINDOW = 40
"""Episodes whose mean return is judged."""


@dataclass(frozen=True)
class Recipe:
    """How an expert is trained, and the mean return that ends it."""

    stop: float
    gamma: float = 0.99
    log_std: float = 0.0


RECIPES = {
    "hopper": Recipe(stop=1300),
    "walker2d": Recipe(stop=1500),
    "halfcheetah": Recipe(stop=2900, gamma=0.98, log_std=-1.0),
}


class UntilMedium(BaseCallback):
    """Ends training between a rollout and its update, so that the policy kept is the one that was judged."""

    def __init__(self, stop: float, env: VecNormalize):
        super().__init__()
        self.stop, self.env, self.begin = stop, env, time.perf_counter()
        self.weights: dict[str, Tensor] = {}

    def _on_step(self) -> bool:
        return not self.weights

    def _on_rollout_end(self) -> None:
        episodes: deque[dict[str, float]] = self.model.ep_info_buffer or deque()
        mean = sum(e["r"] for e in episodes) / max(len(episodes), 1)
        print(f"{self.num_timesteps} steps  return {mean:.0f}  {time.perf_counter() - self.begin:.0f} s", flush=True)
        if mean >= self.stop and len(episodes) >= WINDOW:
            self.weights = expert_weights(self.model.policy.state_dict(), self.env)


def expert_weights(policy: dict[str, Tensor], env: VecNormalize) -> dict[str, Tensor]:
    """A copy, under the names of GaussianExpert, of what stable-baselines3 keeps in two places."""
    layers = {"net.0": "mlp_extractor.policy_net.0", "net.2": "mlp_extractor.policy_net.2", "net.4": "action_net"}
    weights = {f"{a}.{n}": policy[f"{b}.{n}"] for a, b in layers.items() for n in ("weight", "bias")}
    mean, std = (torch.tensor(v, dtype=torch.float32) for v in (env.obs_rms.mean, (env.obs_rms.var + 1e-8) ** 0.5))
    return {n: v.clone() for n, v in weights.items()} | {"log_std": policy["log_std"].clone(), "mean": mean, "std": std}


def train_expert(name: str, path: Path, seed: int) -> None:
    """PPO until "medium", saved in `path`."""
    recipe, begin = RECIPES[name], time.perf_counter()
    sim = registry.find("env", name)(NUM_ENVS, chunk=1, threads=1)
    env = VecNormalize(Vectorised(sim, seed * NUM_ENVS), gamma=recipe.gamma)
    callback = UntilMedium(recipe.stop, env)
    model = PPO(
        "MlpPolicy",
        env,
        n_steps=128,
        batch_size=512,
        gamma=recipe.gamma,
        seed=seed,
        device="cpu",
        stats_window_size=WINDOW,
        policy_kwargs={"net_arch": [64, 64], "log_std_init": recipe.log_std},
    )
    model.learn(20_000_000, callback=callback)
    expert = GaussianExpert(len(callback.weights["mean"]), len(callback.weights["log_std"]))
    expert.load_state_dict(callback.weights)
    made_by = {
        "command": f"python scripts/make_demos.py {name} --train --seed {seed}",
        "seed": seed,
        "steps": model.num_timesteps,
        "seconds": round(time.perf_counter() - begin),
        "versions": versions("torch", "stable-baselines3", "gymnasium", "mujoco"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    expert.save(path, made_by)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=DEMONSTRATORS)
    parser.add_argument("--out", type=Path, help="default: demos/NAME")
    parser.add_argument("--episodes", type=int, help="default: of each demonstrator's own, 100 or more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", action="store_true", help="train the expert anew")
    parser.add_argument("--expert", type=Path, help="file of the expert; default: the shipped one")
    parser.add_argument("--noise", type=float, help="std of what is added to an oracle's actions")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.train:
        if args.name not in RECIPES:
            parser.error(f"{args.name} is demonstrated by a script, there is nothing to train")
        train_expert(args.name, args.expert or embedded_expert(args.name), args.seed)
    out = args.out or Path("demos") / args.name
    demos = make_demos(args.name, out, expert=args.expert, noise=args.noise, num_episodes=args.episodes, seed=args.seed)
    print(f"{out}: {demos.summary}")


if __name__ == "__main__":
    main()
