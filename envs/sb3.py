"""A simulator as stable-baselines3 sees an environment, for its experts and baselines.

An ended row answers with the next episode's first observation; its info holds what stable-baselines3 reads:
"terminal_observation", "TimeLimit.truncated" (then the value of that observation is added), "episode" (r, l).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box

from rlflow.envs.base import VecEnv

try:
    from stable_baselines3.common import vec_env as sb3
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install 'rlflow-torch[robots]'", name=error.name) from None


class Vectorised(sb3.VecEnv):
    """`env` with chunk = 1 and vector observations; row b's first episode is that of seed + b."""

    def __init__(self, env: VecEnv, seed: int = 0):
        if env.action_shape[0] != 1 or len(env.action_shape) != 2:
            raise ValueError(
                f"an action of shape {env.action_shape}: stable-baselines3 discounts all steps alike, use chunk=1"
            )
        self.env, self.first = env, seed
        bound, wide = np.ones(env.action_shape[1], np.float32), np.full(env.obs_dim, np.inf, np.float32)
        super().__init__(env.num_envs, Box(-wide, wide), Box(-bound, bound))

    def reset(self) -> Any:
        """Observations (B, obs_dim) of the first episodes."""
        return self.env.reset(self.first + torch.arange(self.num_envs)).numpy()

    def step_async(self, actions: Any) -> None:
        """Actions (B, A)."""
        self.env.send(torch.from_numpy(actions).unsqueeze(1), slice(0, self.num_envs))

    def step_wait(self) -> Any:
        """(obs, reward, ended, infos); only the infos of ended rows hold anything."""
        step = self.env.recv()
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for row in step.ended.nonzero()[:, 0].tolist():
            told = {k: step.info[f"episode_{n}"][row].item() for k, n in (("r", "return"), ("l", "length"))}
            infos[row] = {"episode": told, "terminal_observation": step.reached[row].numpy()}
            infos[row]["TimeLimit.truncated"] = bool(step.truncated[row])
        return step.obs.numpy(), step.reward.numpy(), step.ended.numpy(), infos

    def close(self) -> None:
        """Nothing is held."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """No attributes: none are needed."""
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """No attributes."""

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """No methods."""
        return []

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Never."""
        return [False] * self.num_envs
