"""Wrappers: an environment around an environment. Reward scaling, stacked frames, rewards by functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlflow.envs.base import VecEnv, reward_metrics
from rlflow.parallel import dist
from rlflow.parallel.moments import merge, no_moments, scale
from rlflow.rewards.base import RewardSet
from rlflow.types import Step, Tree, tree_map, tree_where

CHANNELS = 4
"""Of a picture, at most: grey, RGB, RGBA."""


class Wrapper(VecEnv):
    """Passes everything on; a subclass changes what it must and keeps its own state."""

    def __init__(self, env: VecEnv):
        self.env = env
        self.num_envs, self.action_shape, self.horizon = env.num_envs, env.action_shape, env.horizon
        self.device, self.obs_spec, self.exact_resume = env.device, env.obs_spec, env.exact_resume
        self.tasks, self.step_seconds, self.targets = env.tasks, env.step_seconds, env.targets

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        return self.env.reset(seeds, mask)

    def send(self, action: Tensor, rows: slice) -> None:
        self.env.send(action, rows)

    def recv(self) -> Step:
        return self.env.recv()

    @property
    def asked(self) -> Tensor:
        """Of the environment inside."""
        return self.env.asked

    @property
    def earned(self) -> Tensor:
        """Of the environment inside."""
        return self.env.earned

    @property
    def unwrapped(self) -> VecEnv:
        return self.env.unwrapped

    def render(self, row: int, size: tuple[int, int] = (192, 192)) -> Tensor:
        return self.env.render(row, size)

    @property
    def reward_weights(self) -> dict[str, float]:
        """Of the environment inside."""
        return self.env.reward_weights

    def metrics(self) -> dict[str, float]:
        """Of the environment inside."""
        return self.env.metrics()

    def own_state(self) -> dict[str, Tensor]:
        """Tensors that this wrapper adds to the state."""
        return {}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `own_state`."""

    def state_dict(self) -> dict[str, Any]:
        """State of the environment inside and of this wrapper."""
        return {"env": self.env.state_dict(), "own": tree_map(torch.clone, self.own_state())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.env.load_state_dict(state["env"])
        self.load_own_state(tree_map(lambda v: v.to(self.device, copy=True), state["own"]))


class RewardScaling(Wrapper):
    """Divides rewards by the running std of the discounted return, over all rows of all processes; clips at +-clip.

    R <- r + gamma^h R, forgotten where an episode ends; std over every R since the start. Episode returns in
    `info` stay in the environment's own units.
    """

    MOMENTS = ("count", "mean", "deviations")  # saved apart: what all rows share is 0-d

    def __init__(self, env: VecEnv, gamma: float = 0.99, clip: float = 10.0):
        super().__init__(env)
        self.gamma, self.clip = gamma, clip
        self.running = torch.zeros(env.num_envs, dtype=torch.float64, device=env.device)
        self.moments = no_moments().to(env.device)

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        """The running returns of the reset rows begin anew; the moments stay."""
        self.running = torch.zeros_like(self.running) if mask is None else torch.where(mask, 0.0, self.running)
        return self.env.reset(seeds, mask)

    def recv(self) -> Step:
        """The step with its reward scaled."""
        step = self.env.recv()
        counts = step.valid & step.reward.isfinite()
        gamma = self.gamma if step.num_steps is None else self.gamma ** step.num_steps.double()
        self.running = torch.where(counts, step.reward + gamma * self.running, self.running)
        self.moments = merge(self.moments, self.running, counts)
        self.running = torch.where(step.ended, 0.0, self.running)
        reward = (step.reward / scale(self.moments)).clamp(-self.clip, self.clip)
        return replace(step, reward=reward.to(step.reward.dtype))

    def own_state(self) -> dict[str, Tensor]:
        return {"running": self.running} | dict(zip(self.MOMENTS, self.moments, strict=True))

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        self.running, self.moments = state["running"], torch.stack([state[name] for name in self.MOMENTS])


class FrameStack(Wrapper):
    """The last `num` observations side by side, oldest first: (num * D,), and pictures along their channels, which
    stand last, (H, W, num * C), where that axis has at most four numbers, else first, (num * C, H, W).

    An episode begins with its first observation `num` times.
    """

    def __init__(self, env: VecEnv, num: int):
        if num < 1:
            raise ValueError(f"FrameStack needs num >= 1, got {num}")
        super().__init__(env)
        self.num = num
        one = tree_map(lambda v: v.unsqueeze(0), env.obs_spec)
        self.obs_spec = tree_map(lambda v: v[0], _beside([one] * num))
        self.frames: list[Tree] = []

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        """First observations, repeated, in the rows of `mask`; the other rows keep their frames."""
        obs = self.env.reset(seeds, mask)
        mask = torch.ones(self.num_envs, dtype=torch.bool, device=self.device) if mask is None else mask
        self.frames = [tree_where(mask, obs, old) for old in self.frames or [obs] * self.num]
        return _beside(self.frames)

    def recv(self) -> Step:
        """The step with stacked observations; the last of an ended row hold the frames of its own episode."""
        step = self.env.recv()
        frames = [*self.frames[1:], step.reached]
        self.frames = [tree_where(step.ended, step.obs, frame) for frame in frames]
        final = None if step.final_obs is None else _beside(frames)
        return replace(step, obs=_beside(self.frames), final_obs=final)

    def own_state(self) -> dict[str, Tensor]:
        return {str(i): frame for i, frame in enumerate(self.frames)}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        self.frames = [state[str(i)] for i in range(self.num)]


def _beside(frames: Sequence[Tree]) -> Tree:
    """Observations (B, ...) along their channels, or the first axis of what is no picture."""
    first = frames[0]
    if isinstance(first, dict):
        return {name: _beside([frame[name] for frame in frames]) for name in first}
    channels_last = first.ndim == 4 and first.shape[-1] <= CHANNELS
    return torch.cat(list(frames), -1 if channels_last else 1)


class Processed(Wrapper):
    """An environment as a policy with processors of its own sees it: observations go through `before`, actions
    (rows, *action_shape) through `after`, which gives what the environment takes.

    Of a padded chunk `after` may drop what is never carried out: a shorter chunk tells so by `num_steps`.
    """

    def __init__(
        self,
        env: VecEnv,
        before: Callable[[Tree], Tree],
        after: Callable[[Tensor], Tensor],
        action_shape: Sequence[int],
    ):
        super().__init__(env)
        self.before, self.after, self.action_shape = before, after, tuple(action_shape)
        self.obs_spec = None

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        return self.before(self.env.reset(seeds, mask))

    def send(self, action: Tensor, rows: slice) -> None:
        self.env.send(self.after(action), rows)

    def recv(self) -> Step:
        """The step with both its observations processed."""
        step = self.env.recv()
        final = None if step.final_obs is None else self.before(step.final_obs)
        return replace(step, obs=self.before(step.obs), final_obs=final)


class Decoded(Wrapper):
    """An environment as a network acts in it that has units and padding of its own.

    `decode` makes actions (rows, H', *A) in the environment's units of samples (rows, *action_shape); the first H of
    them are carried out.

    ValueError for actions of another number, and for a chunk that is longer than what the network plans.
    """

    def __init__(self, env: VecEnv, decode: Callable[[Tensor], Tensor], action_shape: Sequence[int]):
        super().__init__(env)
        self.decode, self.action_shape = decode, tuple(action_shape)
        found = tuple(decode(torch.zeros(1, *self.action_shape, device=env.device)).shape[1:])
        if found[1:] != tuple(env.action_shape[1:]):
            raise ValueError(f"the policy makes actions {found}, the environment takes {tuple(env.action_shape[1:])}")
        if found[0] < env.action_shape[0]:
            raise ValueError(
                f"the policy plans {found[0]} actions, the environment carries out {env.action_shape[0]} of them: set "
                f"env.settings.chunk={found[0]} or less"
            )
        self.bounds = getattr(env.unwrapped, "bounds", None)

    def send(self, action: Tensor, rows: slice) -> None:
        made = self.decode(action)[:, : self.env.action_shape[0]].to(self.device)
        self.env.send(made if self.bounds is None else self.bounds.inverse(made), rows)


class Watched(Wrapper):
    """Base of wrappers that pay anew: what was observed (B, ...) and sent (B, *A), kept until the step is told."""

    def __init__(self, env: VecEnv):
        super().__init__(env)
        self.obs: Tree = None
        self.action = torch.zeros(env.num_envs, *env.action_shape, device=env.device)

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        self.obs = self.env.reset(seeds, mask)
        return self.obs

    def send(self, action: Tensor, rows: slice) -> None:
        self.action[rows] = action.detach().to(self.action)
        self.env.send(action, rows)


class RewardWrapper(Watched):
    """Rewards by functions and models in place of the environment's own, as for images.

    Their columns: obs, action (as sent), next_obs (truly reached), reward (the environment's own) and every entry
    of `info`. A row without a score (None, nan) has reward nan and is not valid: it is masked, never zero.
    """

    COLUMNS = ("obs", "action", "next_obs", "reward")

    def __init__(self, env: VecEnv, rewards: RewardSet):
        super().__init__(env)
        self.rewards = rewards

    def recv(self) -> Step:
        """The step with its reward replaced; `reward_parts` holds each function's score."""
        step = self.env.recv()
        named = dict(zip(self.COLUMNS, (self.obs, self.action.clone(), step.reached, step.reward), strict=True))
        parts = self.rewards.compute(step.info | named, self.num_envs)
        parts = {name: score.to(self.device) for name, score in parts.items()}
        reward, valid = self.rewards.total(parts, {n: dist.all_gather_rows(v) for n, v in parts.items()})
        self.obs = step.obs
        return replace(step, reward=reward, valid=step.valid & valid, reward_parts=parts)

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weights when rewards combine as advantages."""
        return self.rewards.weights if self.rewards.normalize == "advantage" else {}

    def metrics(self) -> dict[str, float]:
        """Those of the rewards and of the environment inside."""
        return self.env.metrics() | reward_metrics(self.rewards)

    def own_state(self) -> dict[str, Tensor]:
        return {"obs": self.obs}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        self.obs = state["obs"]
