"""Clone a policy in a Gymnasium environment of your own, then fine-tune it with ReinFlow; a minute of one core.

python docs/examples/own_robot.py FOLDER 500 [key=value ...]     500 steps of cloning
"""

import sys

import gymnasium as gym
import numpy as np
import torch

import rlflow as rf
from rlflow.envs.demos.dataset import Episode, write_demos
from rlflow.flow.matching import independent
from rlflow.models.io import save_field
from rlflow.pretrain.cloning import Cloning


class Docking(gym.Env):
    """A point in the plane flies to the origin: reward minus its distance. The time limit of 20 steps truncates."""

    observation_space = gym.spaces.Box(-5, 5, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)  # other bounds are stretched to [-1, 1]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # the start must follow from the seed: held-out episodes are fixed by it
        self.x = self.np_random.uniform(-2, 2, 2).astype(np.float32)
        return self.x, {}

    def step(self, action):
        self.x = np.clip(self.x + 0.3 * action, -5, 5).astype(np.float32)
        return self.x, -float(np.linalg.norm(self.x)), False, False, {}


gym.register("Docking-v0", Docking, max_episode_steps=20)


def demonstration(seed: int) -> Episode:
    """A clumsy pilot: the right direction, too slow, with noise."""
    env = gym.make("Docking-v0")
    (x, _), steps, over = env.reset(seed=seed), [], False
    while not over:
        action = np.clip(-0.3 * x + 0.4 * env.np_random.normal(size=2), -1, 1).astype(np.float32)
        before, (x, reward, _, over, _) = x, env.step(action)
        steps.append((before, action, np.float32(reward)))
    obs, action, reward = (torch.tensor(np.stack(column)) for column in zip(*steps, strict=True))
    return Episode(obs, action, reward, terminated=False, truncated=True)


folder, clone_steps, *more = sys.argv[1:]
env = {"name": "gym", "settings": {"env_id": "Docking-v0", "chunk": 2}}  # two actions a decision
demos = write_demos(f"{folder}/demos", map(demonstration, range(50)), env, made_by={"who": "a clumsy pilot"})
field, loss = Cloning("docking", "gym", chunk=2).clone(demos, int(clone_steps), seed=0, coupling=independent)
save_field(field, f"{folder}/cloned")
settings = [f"policy.field={folder}/cloned", "env.name=gym", f"env.settings={env['settings']}", "env.num_groups=32"]
settings += ["train.iterations=30", "algorithm.optimizer.lr=3e-4", "eval.num=50", "eval.every=10"]
metrics = rf.Trainer("robot_reach_reinflow", f"{folder}/run", overrides=[*settings, *more]).fit()
print(f"held-out loss of the clone {loss:.3f}; return after fine-tuning {metrics['eval/heldout/return']:.2f}")
