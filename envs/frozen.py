"""A frozen policy inside the environment: a learner of its own acts on it, and its weights never move.

    start_noise   a = flow(obs, x_0),  x_0 = bound clip(u, -1, 1)     DSRL (Wagenmaker et al. 2025, arXiv:2506.15799)
    residual      a = flow(obs, x_0) + scale clip(u, -1, 1),  x_0 ~ N(0, I)                 (Silver et al. 2018)

u is what the learner does, so any learner does either. Nothing is differentiated through the flow: it may be anything
that makes an action of an observation and a start noise, a vision-language-action model on a server too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rlflow.envs.base import VecEnv
from rlflow.envs.seeds import GOLDEN, mix, normal
from rlflow.envs.wrappers import Wrapper
from rlflow.flow.policy import FlowPolicy
from rlflow.ranges import Limit, Positive, Size
from rlflow.registry import SettingError
from rlflow.types import Step, Tree, tree_leaves, tree_map

STARTS = 0x1D8E4E27C47D124F
"""Keeps the seeds of start noises apart from those of episodes."""
BASE = "base"
"""Entry of a residual learner's observation: what the frozen policy would do."""


class Flow(Protocol):
    """A policy seen from outside: an action from an observation and a start noise, and from nothing else."""

    noise_shape: tuple[int, ...]
    """*D of one start noise."""

    def __call__(self, obs: Tree, x_0: Tensor) -> Tensor:
        """Actions (N, *A) at raw observations (N, ...) from start noises (N, *D)."""

    def features(self, obs: Tree) -> Tensor:
        """What it makes of raw observations (N, ...) itself, (N, F)."""


class BasePolicy:
    """The policy that is acted on: a FlowPolicy by its deployment sampler.

    There is no noise but the start's, no graph, and no choice among samples.
    Samples of a network with units of its own stay in these; around its environment is `Decoded`.
    """

    def __init__(self, policy: FlowPolicy):
        self.policy, self.noise_shape = policy.requires_grad_(False), tuple(policy.event_shape)

    @torch.no_grad()
    def __call__(self, obs: Tree, x_0: Tensor) -> Tensor:
        """Actions (N, H, *A) after the squash."""
        policy = self.policy
        x_0 = x_0.to(policy.device, policy.dtype)
        return policy.squash(policy.sample(policy.encode(obs), x_0=x_0).final)

    @torch.no_grad()
    def features(self, obs: Tree) -> Tensor:
        """The pooled ones, by which critics judge."""
        return self.policy.encode(obs)["pooled"].float()


class Steering:
    """What a learner sees of an environment with a frozen policy inside, and what is carried out when it acts.

    Where it `draws`, `see` and `act` are given the start noises x_0 (N, *D) that the frozen policy would draw.
    """

    draws: bool = False

    def __init__(self, flow: Flow):
        self.flow = flow

    def learner_shape(self, action_shape: tuple[int, ...]) -> tuple[int, ...]:
        """*U of what the learner does, around an environment that takes actions of `action_shape`."""
        raise NotImplementedError

    def see(self, obs: Tree, x_0: Tensor | None = None) -> Tree:
        """What the learner sees at observations (N, ...)."""
        return obs

    def act(self, obs: Tree, seen: Tree, u: Tensor, x_0: Tensor | None = None) -> Tensor:
        """(N, *A) for the environment, where the learner sees `seen` of obs (N, ...) and does u (N, *U)."""
        raise NotImplementedError


class StartNoise(Steering):
    """DSRL: the learner's action is the start noise x_0 of a frozen flow, within +-bound in every number.

    Bounded, x_0 stays where the flow was trained, as N(0, 1) is within 1.5 in .87 and within 3 in .997 of draws. With
    bound=inf nothing is scaled or clipped: then x_0 ~ N(0, I) is the frozen policy itself. With `features` the learner
    sees what the frozen policy made of the observation, in its place: of pictures and words, numbers that a small
    network can read. They are made once more where the learner acts.

    A vision-language-action model has a noise of 50 actions of 32 numbers, of which ten of seven are carried out. With
    `chosen` the learner has the first so many of each axis, [10, 7] say, and the frozen policy draws the others; with
    `repeat` the last action that was chosen is repeated over those that were not, as released for pi0 with [1, 32].
    """

    def __init__(
        self,
        flow: Flow,
        bound: Limit = 1.5,
        features: bool = False,
        chosen: tuple[Size, ...] | None = None,
        repeat: bool = False,
    ):
        super().__init__(flow)
        self.bound, self.features, self.repeat = bound, features, repeat
        whole = flow.noise_shape
        self.chosen = whole if chosen is None else tuple(chosen)
        if len(self.chosen) != len(whole) or not all(1 <= a <= b for a, b in zip(self.chosen, whole, strict=True)):
            told = f"{list(self.chosen)} is no part of the frozen policy's start noise, {list(whole)}"
            raise SettingError("chosen", f"{told}: give at most these, at least 1")
        self.draws = self.chosen != whole
        if repeat and self.chosen[0] == whole[0]:
            raise SettingError("repeat", f"all {whole[0]} actions are chosen: let `chosen` have fewer")

    def learner_shape(self, action_shape: tuple[int, ...]) -> tuple[int, ...]:
        """That of the chosen noise."""
        return self.chosen

    def see(self, obs: Tree, x_0: Tensor | None = None) -> Tree:
        """The observation, or the frozen policy's features (N, F) of it."""
        return self.flow.features(obs).to(tree_leaves(obs)[0].device) if self.features else obs

    def act(self, obs: Tree, seen: Tree, u: Tensor, x_0: Tensor | None = None) -> Tensor:
        """What the flow makes of the noise."""
        u = u if self.bound == float("inf") else self.bound * u.clamp(-1, 1)
        return self.flow(obs, u if x_0 is None else self._whole(u, x_0.to(u)))

    def _whole(self, u: Tensor, x_0: Tensor) -> Tensor:
        """x_0 (N, *D) with the chosen ones of u (N, *U) in their places."""
        first, *others = (slice(size) for size in self.chosen)
        x_0 = x_0.clone()
        x_0[:, first, *others] = u
        if self.repeat:
            x_0[:, self.chosen[0] :, *others] = u[:, -1:]
        return x_0


class Residual(Steering):
    """A correction of at most +-scale to every number of a frozen policy's action (Silver et al. 2018).

    The frozen policy draws its start noises; what it would do is the entry "base" of the observation, for without it
    the same correction at the same state would end in different places. A correction of 0 is the frozen policy.
    """

    draws = True

    def __init__(self, flow: Flow, scale: Positive = 0.1):
        super().__init__(flow)
        self.scale = scale

    def learner_shape(self, action_shape: tuple[int, ...]) -> tuple[int, ...]:
        """That of the action."""
        return action_shape

    def see(self, obs: Tree, x_0: Tensor | None = None) -> Tree:
        """The observation (as the entry "obs" if it is one tensor) and, as "base", the frozen policy's action."""
        seen = obs if isinstance(obs, dict) else {"obs": obs}
        if BASE in seen:
            raise ValueError(f"the environment shows an entry {BASE!r} of its own: rename it, a residual adds one")
        assert x_0 is not None
        return {**seen, BASE: self.flow(obs, x_0).to(tree_leaves(obs)[0].device, torch.float32)}

    def act(self, obs: Tree, seen: Tree, u: Tensor, x_0: Tensor | None = None) -> Tensor:
        """The sum; the environment clips it to its bounds."""
        base = seen[BASE]
        return base + self.scale * u.to(base).clamp(-1, 1)


class Frozen(Wrapper):
    """An environment as the learner of a `Steering` sees it: rewards, ends and everything told stay the environment's.

    Start noises that the frozen policy draws by itself are functions of the row's seed and of the number of decisions
    since its reset. ValueError where the frozen policy does not read what is observed, or does not make what is done.
    """

    def __init__(self, env: VecEnv, steering: Steering):
        super().__init__(env)
        self.steering = steering
        self.action_shape = tuple(steering.learner_shape(tuple(env.action_shape)))
        self.first, self.count = torch.zeros(2, self.num_envs, dtype=torch.long, device=self.device)
        self.obs: Tree = None
        self.seen: Tree = None
        self.starts = self._starts()  # of the decision to come
        self._check()

    def _check(self) -> None:
        """One row of zeros shows whether the two fit, and what the learner sees."""
        if self.env.obs_spec is None:
            return
        obs = tree_map(lambda v: torch.zeros(1, *v.shape, dtype=v.dtype, device=self.device), self.env.obs_spec)
        try:
            starts = self._of(slice(1))
            seen = self.steering.see(obs, starts)
            made = self.steering.act(obs, seen, torch.zeros(1, *self.action_shape, device=self.device), starts)
        except (RuntimeError, LookupError, TypeError) as error:
            shapes = [tuple(v.shape[1:]) for v in tree_leaves(obs)]
            raise ValueError(f"the frozen policy does not read what is observed here, {shapes}: {error}") from error
        if tuple(made.shape[1:]) != tuple(self.env.action_shape):
            raise ValueError(
                f"the frozen policy makes actions {tuple(made.shape[1:])}, the environment takes "
                f"{tuple(self.env.action_shape)}: set env.settings.chunk, or take another policy"
            )
        self.obs_spec = tree_map(lambda v: torch.empty(v.shape[1:], dtype=v.dtype, device="meta"), seen)

    def _starts(self) -> Tensor | None:
        """(B, *D) standard normal start noises of this decision, where anybody reads them."""
        if not self.steering.draws:
            return None
        shape = self.steering.flow.noise_shape
        seeds = mix((self.first ^ STARTS) + self.count * GOLDEN)
        return normal(seeds, torch.Size(shape).numel()).float().view(self.num_envs, *shape)

    def _of(self, rows: slice) -> Tensor | None:
        return None if self.starts is None else self.starts[rows]

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        """First observations, as the learner sees them, in the rows of `mask`; the other rows keep theirs."""
        seeds = seeds.to(self.device)
        every = torch.ones_like(seeds, dtype=torch.bool) if mask is None else mask.to(self.device)
        self.first, self.count = torch.where(every, seeds, self.first), torch.where(every, 0, self.count)
        self.obs, self.starts = self.env.reset(seeds, mask), self._starts()
        self.seen = self.steering.see(self.obs, self.starts)
        return self.seen

    def send(self, action: Tensor, rows: slice) -> None:
        """Hand over what the frozen policy makes of the learner's actions (rows, *U)."""
        obs, seen = (tree_map(lambda v: v[rows], tree) for tree in (self.obs, self.seen))
        self.env.send(self.steering.act(obs, seen, action.detach(), self._of(rows)), rows)

    def recv(self) -> Step:
        """The step with both its observations as the learner sees them."""
        step = self.env.recv()
        self.count = self.count + 1
        self.obs, self.starts = step.obs, self._starts()
        self.seen = self.steering.see(step.obs, self.starts)
        final = step.final_obs
        if final is not None:
            final = self.seen if final is step.obs else self.steering.see(final, self.starts)
        return replace(step, obs=self.seen, final_obs=final)

    def own_state(self) -> dict[str, Any]:
        seen = {} if self.obs is None else {"obs": self.obs, "seen": self.seen}
        return {"first": self.first, "count": self.count} | seen

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.first, self.count, self.seen = state["first"], state["count"], state.get("seen")
        self.obs, self.starts = state.get("obs"), self._starts()
