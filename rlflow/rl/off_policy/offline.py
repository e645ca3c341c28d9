"""Demonstrations for an off-policy learner: transitions of action chunks, and a flow cloned from them.

A window of H actions from step s of an episode of L steps is one decision, h = min(H, L - s) of them carried out:

    (o_s, a_s .. a_{s+H-1}, sum_{i < h} gamma^i r_{s+i}, gamma^h, o_{s+h})

It ends the episode where s + h = L and the task ended it; where time ended it nobody wrote down what was reached,
and the window is left out. Cloning is flow matching to squash^-1(a), since the chain lives before the squash.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlflow.envs.demos.dataset import Demos
from rlflow.flow.matching import cfm_loss
from rlflow.flow.noise import generator
from rlflow.flow.policy import FlowPolicy
from rlflow.rl.off_policy.replay import Replay, Transitions
from rlflow.rl.optim import AdamW, Deferred
from rlflow.types import tree_leaves, tree_map

CLONING_LR = 1e-3


@dataclass(frozen=True)
class Offline:
    """Data, and what is done with it before the first iteration and in every batch after."""

    data: Transitions
    whole: Tensor  # (M,) the decisions whose actions were all carried out: those that are cloned
    clone: int = 2000  # steps of flow matching
    updates: int = 0  # steps of the learner on this data alone
    share: float = 0.5  # of each batch

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share must be in [0, 1), got {self.share}: some of a batch has to come from the replay")

    def check(self, policy: FlowPolicy) -> None:
        """ValueError where the policy does not see and do what was seen and done."""
        if self.data.action.shape[1:] != policy.event_shape:
            done = tuple(self.data.action.shape[1:])
            raise ValueError(f"offline.demos: chunks of actions there are {done}, the policy's {policy.event_shape}")
        seen = tree_map(lambda v: v[:1], self.data.obs)
        try:
            with torch.no_grad():
                read = policy.encode(seen)["pooled"].shape[-1] == policy.field.num_features
        except (RuntimeError, LookupError, TypeError, ValueError):
            read = False
        if not read:
            shapes = [tuple(v.shape[1:]) for v in tree_leaves(seen)]
            raise ValueError(f"offline.demos: the network of policy.field does not read what is seen there, {shapes}")

    def draw(self, num: int, rng: torch.Generator) -> Transitions:
        """`num` decisions, each equally likely."""
        return self.data.index(torch.randint(len(self.data), (num,), generator=rng).to(self.whole.device))


def drawn(replay: Replay, offline: Offline | None, num: int, rng: torch.Generator, device: torch.device) -> Transitions:
    """`num` decisions of the replay; the demonstrations' share stands first, all of them while the replay is empty."""
    if offline is None:
        return replay.at(replay.draw(num, rng).to(device))
    if not len(replay):
        return offline.draw(num, rng)
    old = round(offline.share * num)
    return Transitions.cat(offline.draw(old, rng), replay.at(replay.draw(num - old, rng).to(device)))


def paid_at_random(batch: Transitions, other: Transitions, mixed: bool, rng: torch.Generator) -> Transitions:
    """The control: `batch` with the pay of another draw; `mixed` where demonstrations stand first in both."""
    if mixed:
        other = other.index(torch.randperm(len(other), generator=rng).to(other.weight.device))
    return batch.paid_as(other)


def offline_data(demos: Demos, chunk: int, gamma: float, device: torch.device) -> tuple[Transitions, Tensor]:
    """All windows of all episodes, and the numbers of the whole ones."""
    parts = [_windows(e, chunk) for e in demos.episodes]
    start, steps, last = (torch.cat(column) for column in zip(*parts, strict=True))
    if not bool((steps == chunk).any()):
        raise ValueError(f"{demos.folder}: no episode that counts has {chunk} steps: take shorter chunks")
    offsets = torch.arange(chunk)
    inside = offsets < steps[:, None]
    index = start[:, None] + torch.where(inside, offsets, 0)
    action, reward = demos.actions(index.flatten()), demos.rewards(index.flatten())
    inside_action = inside.view(*inside.shape, *[1] * (action.ndim - 1))
    discounts = gamma ** torch.arange(chunk + 1, dtype=torch.float32)
    reached = torch.where(last, start, start + steps)  # nobody asks for what follows an end
    data = Transitions(
        obs=demos.observations(start),
        action=torch.where(inside_action, action.unflatten(0, index.shape), 0.0),
        reward=(torch.where(inside, reward.view(index.shape), 0.0) * discounts[:-1]).sum(1),
        discount=torch.where(last, 0.0, discounts[steps]),
        next_obs=demos.observations(reached),
        weight=torch.ones(len(start)),
        counts=inside.float(),
    )
    return data.to(device), (steps == chunk).nonzero()[:, 0].to(device)


def _windows(episode: dict[str, int | bool], chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """(first step in the folder, steps carried out, whether the task ends there) of an episode's windows."""
    length, terminated = int(episode["length"]), bool(episode["terminated"])
    start = torch.arange(length)
    steps = (length - start).clamp(max=chunk)
    last = start + steps == length
    kept = ~last | terminated
    return start[kept] + int(episode["start"]), steps[kept], last[kept]


def clone(policy: FlowPolicy, offline: Offline, batch_size: int, seed: int) -> float:
    """Fit the live flow to the data by flow matching; the mean loss of the last tenth."""
    field, data = policy.field.unguided, offline.data
    field.observe(data.obs)
    trained = [p for p in field.parameters() if p.requires_grad]
    optimizer = Deferred(trained, AdamW(lr=CLONING_LR, cosine=True), "algorithm.offline.clone")
    rng, losses = generator("clone", seed), []
    for step in range(offline.clone):
        optimizer.progress = step / offline.clone
        rows = offline.whole[torch.randint(len(offline.whole), (batch_size,), generator=rng).to(offline.whole.device)]
        x_1 = policy.squash.inverse(data.action[rows])
        x_0, t = torch.randn(x_1.shape, generator=rng).to(x_1), torch.rand(batch_size, generator=rng).to(x_1)
        cond = policy.encode(tree_map(lambda v: v[rows], data.obs))  # noqa: B023 - used at once
        loss = cfm_loss(field, x_1, cond, x_0, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.advance()
        losses.append(loss.detach())
    optimizer.settle()
    return float(torch.stack(losses[-max(1, len(losses) // 10) :]).mean()) if losses else float("nan")
