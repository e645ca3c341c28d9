"""What stable-baselines3's PPO makes of the same simulator, steps and demonstrations as an rlflow run; prints JSON.

    python scripts/robot_baselines.py hopper --seeds 0 1 2                  2 M environment steps each
    python scripts/robot_baselines.py walker2d --like runs/mine             as many as that run took

`scratch` starts from random weights. `cloned` has a Gaussian policy whose mean is first regressed on the actions of
the demonstrations (made by the shipped expert if demos/NAME is absent), and whose observations are normalised as
those were, for good; both have the expert's network. PPO has the settings of stable-baselines3 but for 32
environments of 128 steps a rollout, minibatches of 256, a learning rate that falls to 0, and scaled rewards.

Judged as `rlflow eval` judges: 40 seeded episodes, the same start states, the mean action.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from rlflow import registry
from rlflow.envs.demos.dataset import Demos
from rlflow.envs.demos.experts import play, versions
from rlflow.envs.sb3 import Vectorised
from rlflow.envs.seeds import evaluation_seeds
from rlflow.models.normalizer import Normalizer
from rlflow.pretrain.cloning import demos_of
from rlflow.pretrain.matching import learning_rate_factor
from rlflow.report.metrics_file import read_metrics

NUM_ENVS, NUM_STEPS, ROWS = 32, 128, 512
GAMMA = {"hopper": 0.99, "walker2d": 0.99, "halfcheetah": 0.98}


@dataclass(frozen=True)
class Settings:
    """What both baselines are told."""

    env: str
    steps: int = 2_000_000
    seed: int = 0
    log_std: float = -1.0  # of the cloned Gaussian at the start of PPO
    clone_steps: int = 3000
    episodes: int = 40
    points: int = 10  # evaluations after the first
    demos: Path | None = None

    def simulators(self, num_envs: int) -> Any:
        """As the experts have them: an action is one primitive step."""
        return registry.find("env", self.env)(num_envs, chunk=1, threads=1)


class Normalised(FlattenExtractor):
    """Observations as the demonstrations' moments (3, D) normalise them, whatever PPO sees."""

    def __init__(self, space: Any, moments: Tensor):
        super().__init__(space)
        self.normalizer = Normalizer(moments.shape[1])
        self.normalizer.moments.copy_(moments)

    def forward(self, obs: Tensor) -> Tensor:
        """(N, D), normalised."""
        return self.normalizer(obs)


def ppo(settings: Settings, norm_obs: bool, **policy: Any) -> PPO:
    """PPO on our simulators."""
    gamma = GAMMA[settings.env]
    env = Vectorised(settings.simulators(NUM_ENVS), settings.seed * NUM_ENVS)
    return PPO(
        "MlpPolicy",
        VecNormalize(env, norm_obs=norm_obs, gamma=gamma),
        n_steps=NUM_STEPS,
        batch_size=256,
        learning_rate=LinearSchedule(3e-4, 0.0, 1.0),
        gamma=gamma,
        seed=settings.seed,
        device="cpu",
        policy_kwargs={"net_arch": [64, 64], **policy},
    )


def scratch(settings: Settings) -> PPO:
    """From random weights, with a running normaliser."""
    return ppo(settings, norm_obs=True)


def cloned(settings: Settings) -> PPO:
    """From a Gaussian cloned from the demonstrations."""
    demos = demos_of(settings.env, settings.demos or Path("demos") / settings.env)
    extractor = {"features_extractor_class": Normalised, "features_extractor_kwargs": {"moments": demos.moments}}
    model = ppo(settings, norm_obs=False, log_std_init=settings.log_std, **extractor)
    regress(model, demos, settings.clone_steps, settings.seed)
    return model


BASELINES: dict[str, Callable[[Settings], PPO]] = {"scratch": scratch, "cloned": cloned}


def regress(model: PPO, demos: Demos, steps: int, seed: int) -> float:
    """Fit the policy's mean to the actions by least squares; the last batch's squared error."""
    train, _ = demos.split()
    rng = torch.Generator().manual_seed(seed)
    actor = [*model.policy.mlp_extractor.policy_net.parameters(), *model.policy.action_net.parameters()]
    optimizer = torch.optim.Adam(actor, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: learning_rate_factor(i, steps))
    error = torch.zeros(())
    for _, (action, obs) in zip(range(steps), train.chunks(1).batches(ROWS, rng), strict=False):
        error = (model.policy.get_distribution(obs).mode() - action[:, 0]).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
    return error.item()


@torch.no_grad()
def judge(model: PPO, settings: Settings) -> Tensor:
    """(N,) returns of seeded episodes by the mean action, from the start states of `rlflow eval`."""
    env = model.get_env()

    def act(obs: Tensor) -> Tensor:
        action, _ = model.predict(env.normalize_obs(obs.numpy()), deterministic=True)
        return torch.from_numpy(action).unsqueeze(1)

    episodes = play(settings.simulators(settings.episodes), act, int(evaluation_seeds(0, 1)))
    return torch.stack([e.reward.double().sum() for e in episodes])


class Curve(BaseCallback):
    """Judges before the first rollout and whenever another share of the steps is done; seconds are of training."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings, self.points = settings, list[dict[str, float]]()
        self.begin = self.away = 0.0

    def _on_training_start(self) -> None:
        self.begin = time.perf_counter()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= len(self.points) * self.settings.steps / self.settings.points:
            self.add()

    def _on_training_end(self) -> None:
        self.add()

    def add(self) -> None:
        """One point of the curve."""
        now = time.perf_counter()
        returns = judge(self.model, self.settings)
        point = {"env_steps": self.num_timesteps, "seconds": round(now - self.begin - self.away, 1)}
        point |= {"return": round(returns.mean().item(), 1), "std": round(returns.std().item(), 1)}
        self.points.append(point)
        print(json.dumps(point), file=sys.stderr, flush=True)
        self.away += time.perf_counter() - now


def run(name: str, settings: Settings) -> dict[str, Any]:
    """One baseline, trained; `prepared_seconds` is what came before PPO."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    model = BASELINES[name](settings)
    prepared = time.perf_counter() - begin
    curve = Curve(settings)
    model.learn(settings.steps, callback=curve)
    return {
        "baseline": name,
        "seed": settings.seed,
        "prepared_seconds": round(prepared, 1),
        "cpu_seconds": round(time.process_time() - begin_cpu, 1),
        "return": curve.points[-1]["return"],
        "curve": curve.points,
    }


def steps_of(folder: Path) -> int:
    """Environment steps that an rlflow run took."""
    spent = [row["cost/samples_total"] for row in read_metrics(folder) if "cost/samples_total" in row]
    if not spent:
        raise SystemExit(f"{folder} is no run of a robot that has trained: give --steps")
    return int(spent[-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", choices=GAMMA)
    parser.add_argument("--baselines", nargs="+", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    spent = parser.add_mutually_exclusive_group()
    spent.add_argument("--steps", type=int, default=Settings.steps, help="environment steps")
    spent.add_argument("--like", type=Path, help="run folder: as many as it took")
    parser.add_argument("--points", type=int, default=Settings.points, help="evaluations on the way")
    parser.add_argument("--episodes", type=int, default=Settings.episodes)
    parser.add_argument("--log-std", type=float, default=Settings.log_std, help="of the cloned Gaussian, at first")
    parser.add_argument("--demos", type=Path, help="folder; default: demos/NAME, made if absent")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = args.steps if args.like is None else steps_of(args.like)
    told = {name: getattr(args, name) for name in ("env", "log_std", "episodes", "points", "demos")}
    settings = [Settings(steps=steps, seed=seed, **told) for seed in args.seeds]
    rows = [run(name, one) for one in settings for name in args.baselines]
    about = {"env": args.env, "steps": steps, "threads": args.threads, "log_std": args.log_std}
    used = versions("torch", "stable-baselines3", "gymnasium", "mujoco")
    print(json.dumps({**about, "versions": used, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
