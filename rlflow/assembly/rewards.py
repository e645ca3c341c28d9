"""The rewards of training, and the judges of evaluation."""

from __future__ import annotations

from rlflow import registry
from rlflow.config.schema import Config
from rlflow.rewards.base import Reward, RewardSet
from rlflow.rewards.component import make_reward
from rlflow.rewards.frames import of_videos


def make_rewards(config: Config, trust_code: bool = False, frames: int | None = None) -> RewardSet:
    """The training rewards, of videos where `frames` says how many frames they have."""
    c = config.reward
    found = [
        Reward(short_name(n), make_reward(n, c.settings, trust_code), w, c.timeout_s) for n, w in c.weights.items()
    ]
    return RewardSet([_of_videos(r, config, frames) for r in found], c.normalize)


def make_judges(config: Config, trust_code: bool = False, frames: int | None = None) -> RewardSet:
    """The evaluation metrics under their display names."""
    return RewardSet([make_judge(n, r, config, trust_code, frames) for n, r in config.eval.metrics.items()])


def make_judge(name: str, reward: str, config: Config, trust_code: bool, frames: int | None) -> Reward:
    return _of_videos(Reward(name, make_reward(reward, config.reward.settings, trust_code), 1.0, 600.0), config, frames)


def _of_videos(reward: Reward, config: Config, frames: int | None) -> Reward:
    with registry.located("reward.frames"):
        return of_videos(reward, config.reward.frames, frames)


def short_name(name: str) -> str:
    """Metric name of a reward: the function's own name for a dotted path."""
    return name.rpartition(":")[2].rpartition(".")[2]
