"""The peer of `rlflow bench robot --paper`: a plain ReinFlow loop, with the costs of the published release.

One process per environment, a chunk per message; every chunk of experience is scored ten times over, in minibatches of
a quarter of the enlarged batch; advantages per chunk. Plain torch, nothing of rlflow's learners. Written from the
paper (Zhang et al., 2025) and its settings for Hopper; only its costs are meant to be compared, not its learning.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rlflow.bench.size import Size
from rlflow.bench.stopwatch import Phases
from rlflow.models.mlp import mlp

LOW, HIGH = math.log(0.10), math.log(0.24)  # bounds of the noise
MINIBATCHES = 4
GAMMA, LAM, CLIP = 0.99, 0.95, 0.01


class Chunked(gymnasium.Wrapper):
    """Several primitive actions (H * A,) as one, up to the end of the episode; rewards are added."""

    def __init__(self, env: gymnasium.Env, chunk: int) -> None:
        super().__init__(env)
        self.chunk, space = chunk, env.action_space
        self.action_space = gymnasium.spaces.Box(np.tile(space.low, chunk), np.tile(space.high, chunk))

    def step(self, action: Any) -> Any:
        """Gymnasium's five, and how many steps were made."""
        first, *others = action.reshape(self.chunk, -1)
        obs, total, terminated, truncated, _ = self.env.step(first)
        made = 1
        for one in others:
            if terminated or truncated:
                break
            obs, reward, terminated, truncated, _ = self.env.step(one)
            total, made = total + float(reward), made + 1
        return obs, float(total), terminated, truncated, {"num_steps": made}


class PlainLoop:
    """Iterations of the loop; `phases` and `env_steps` as ReinFlow has them."""

    def __init__(self, size: Size, duplicates: int = 10) -> None:
        torch.manual_seed(0)
        self.size, self.duplicates, self.phases, self.env_steps = size, duplicates, Phases(), 0
        makers = [lambda: Chunked(gymnasium.make("Hopper-v5"), size.chunk)] * size.num_envs
        self.envs = gymnasium.vector.AsyncVectorEnv(makers, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)
        self.obs, _ = self.envs.reset(seed=0)
        obs_dim, self.dim = self.obs.shape[1], self.envs.single_action_space.shape[0]
        self.field = mlp([self.dim + obs_dim + 1, *[size.width] * size.depth, self.dim])
        self.noise = mlp([obs_dim + 1, 64, 64, self.dim], torch.nn.Tanh)
        self.critic = mlp([obs_dim, 256, 256, 256, 1])
        self.actor = torch.optim.AdamW([*self.field.parameters(), *self.noise.parameters()], lr=4.5e-5)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=6.5e-4)

    def close(self) -> None:
        """End the processes."""
        self.envs.close()

    def transition(self, x: Tensor, obs: Tensor, k: int) -> torch.distributions.Normal:
        """The Gaussian of denoising step k."""
        t = torch.full((len(x), 1), k / self.size.num_steps)
        level = (torch.tanh(self.noise(torch.cat([obs, t], 1))) + 1) / 2
        mean = x + self.field(torch.cat([x, obs, t], 1)) / self.size.num_steps
        return torch.distributions.Normal(mean, (LOW + (HIGH - LOW) * level).exp())

    def log_prob(self, chain: Tensor, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probability, entropy) (N,) of chains (N, K + 1, D), averaged over steps and dimensions."""
        steps = [self.transition(chain[:, k], obs, k) for k in range(self.size.num_steps)]
        found = torch.stack([s.log_prob(chain[:, k + 1]).mean(1) for k, s in enumerate(steps)], 1)
        return found.mean(1), torch.stack([s.entropy().mean(1) for s in steps], 1).mean(1)

    def __call__(self, iteration: int) -> None:
        """Rollout and update."""
        steps = [self._step() for _ in range(self.size.num_chunks)]
        with self.phases.phase("update"):
            self._update(*(torch.stack(column) for column in zip(*steps, strict=True)))

    @torch.no_grad()
    def _step(self) -> tuple[Tensor, ...]:
        with self.phases.phase("policy"):
            obs = torch.from_numpy(self.obs).float()
            chain = [torch.randn(len(obs), self.dim)]
            for k in range(self.size.num_steps):
                chain.append(self.transition(chain[-1], obs, k).sample())
        with self.phases.phase("simulate"):
            action = chain[-1].clamp(-1, 1).numpy()
            self.obs, reward, terminated, truncated, info = self.envs.step(action)
        last = info.get("final_info", {}).get("num_steps", 0)  # an ended row's is told there
        self.env_steps += int(np.sum(info.get("num_steps", 0)) + np.sum(last))
        flags = torch.from_numpy(terminated), torch.from_numpy(truncated)
        return obs, torch.stack(chain, 1), torch.from_numpy(reward).float(), *flags

    def _update(self, obs: Tensor, chain: Tensor, reward: Tensor, terminated: Tensor, truncated: Tensor) -> None:
        advantage, returns = self._advantages(obs, reward, terminated, truncated)
        with torch.no_grad():
            parts = zip(chain.flatten(0, 1).split(4096), obs.flatten(0, 1).split(4096), strict=True)
            old = torch.cat([self.log_prob(c, o)[0] for c, o in parts])
        data = [v.flatten(0, 1) for v in (obs, chain, advantage, returns)] + [old]
        data = [v.repeat_interleave(self.duplicates, 0) for v in data]
        for _ in range(self.size.epochs):
            for rows in torch.randperm(len(old) * self.duplicates).chunk(MINIBATCHES):
                self._minibatch(*(v[rows] for v in data))

    def _minibatch(self, obs: Tensor, chain: Tensor, advantage: Tensor, returns: Tensor, old: Tensor) -> None:
        log_prob, entropy = self.log_prob(chain, obs)
        ratio, a = (log_prob - old).exp(), (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        surrogate = torch.max(-a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        value_loss = 0.5 * (self.critic(obs).squeeze(1) - returns).square().mean()
        self.actor.zero_grad(), self.critic_optimizer.zero_grad()
        (surrogate - 0.03 * entropy.mean() + 0.5 * value_loss).backward()
        self.actor.step(), self.critic_optimizer.step()

    @torch.no_grad()
    def _advantages(self, obs: Tensor, reward: Tensor, terminated: Tensor, truncated: Tensor) -> tuple[Tensor, Tensor]:
        """(advantages, returns) (T, B), by GAE."""
        values = self.critic(torch.cat([obs, torch.from_numpy(self.obs).float()[None]])).squeeze(-1)
        found, running = torch.zeros_like(reward), torch.zeros_like(reward[0])
        for t in reversed(range(len(reward))):
            delta = reward[t] + GAMMA * values[t + 1] * ~terminated[t] - values[t]
            running = delta + GAMMA * LAM * running * ~(terminated[t] | truncated[t])
            found[t] = running
        return found, found + values[:-1]
