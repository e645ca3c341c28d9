"""DSRL learns: SAC over the start noise of a policy of four modes, of which it only sees what comes out, finds the best."""

import torch
from torch import Tensor

from rlflow.envs.frozen import Frozen, StartNoise
from rlflow.envs.simulators.toy import ToyBandit
from rlflow.flow.kernels import LearnedNoise
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.squash import Tanh
from rlflow.flow.steps import All
from rlflow.models.gaussian import GaussianField
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.rl.off_policy.actor import ActorSettings
from rlflow.rl.off_policy.learner import OffPolicySettings
from rlflow.rl.off_policy.replay import Replay
from rlflow.rl.off_policy.sac import SAC
from rlflow.rl.off_policy.twin import TwinSettings
from rlflow.rl.optim import AdamW


class FourModes:
    """Plays (+-.5, +-.5) against the signs of its noise: mean reward .7, and no gradient anywhere."""

    noise_shape = (1, 2)

    def __call__(self, obs: Tensor, x_0: Tensor) -> Tensor:
        return -0.5 * x_0.sign()

    def features(self, obs: Tensor) -> Tensor:
        return obs


def test_the_best_of_four_modes_is_found_through_a_black_box() -> None:
    torch.manual_seed(0)
    env = Frozen(ToyBandit(64), StartNoise(FourModes()))
    field = GaussianField(1, (1, 2), width=16)
    policy = FlowPolicy(field, LearnedNoise(1, (1, 2), 0.3, 1.0, width=8), num_steps=1, squash=Tanh())
    shared = OffPolicySettings(64, start=256, updates_per_step=0.25, twin=TwinSettings(width=32, lr=3e-3))
    actor = ActorSettings(AdamW(lr=3e-3, betas=(0.9, 0.999)))
    sac = SAC(policy, All(), Replay(4096, 1.0), shared, actor, alpha=0.02, alpha_lr=0.0)
    collector = Collector(env, policy, None, All(), Groups(64, 1), horizon=1)
    rewards = []
    for iteration in range(24):
        rollout = collector.collect(iteration)
        rewards.append(float(rollout.reward.mean()))
        sac.update(rollout)
    assert sum(rewards[:4]) / 4 < 0.8
    assert sum(rewards[-4:]) / 4 > 0.95
