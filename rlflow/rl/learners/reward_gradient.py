"""RewardGradient: ascent of a differentiable reward, by its gradient through the sampler that made the sample.

    a_K = dR/dx_K,   a_k = (dx_{k+1}/dx_k)^T a_{k+1},   gradient = mean over samples of sum_k (dx_{k+1}/dw)^T a_{k+1}

over the last n steps of the deployment sampler (DRaFT-n, Clark et al. 2024), or at the one-step prediction from one of
them (ReFL, Xu et al. 2023); adjoint.py has Adjoint Matching. The rollout keeps the states x_k, so the way back
takes one step at a time, whose activations are made anew: whatever n is, memory is that of one step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlflow.flow.gaussian import reduce_events
from rlflow.flow.noise import generator
from rlflow.flow.path import data, expand
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import Plan, Steps
from rlflow.parallel import dist
from rlflow.ranges import Size
from rlflow.rl.batch import cond_of
from rlflow.rl.groups import Groups
from rlflow.rl.optim import AdamW, Optimizer
from rlflow.types import Cond, Rollout

Graded = Callable[[Tensor, Tensor], Tensor]
"""Actions (M, *D), after the squash, and the rows (M,) whose observations they are judged by, to rewards (M,) with a
graph; nan where there is none."""


@dataclass(frozen=True)
class Samples:
    """M samples, and the last n denoising steps of each."""

    policy: FlowPolicy
    encode: Callable[[], Cond]  # by the weights in place
    reward: Callable[[Tensor], Tensor]  # x_K (M, *D) to (M,), with a graph
    path: Tensor  # (M, n + 1, *D) the states before the steps, and x_K
    t: Tensor  # (n + 1,)
    noisy: tuple[bool, ...]  # of the n steps
    share: Tensor  # (M,) of a sample in the mean over all processes
    uniform: Tensor  # (M,) in [0, 1), for what is drawn

    def time(self, k: int) -> Tensor:
        """t_k of every sample (M,)."""
        return self.t[k].expand(len(self.path))

    def mean(self, k: int, x: Tensor) -> Tensor:
        """Where step k takes x (M, *D), by the weights in place: without its noise, if it has any."""
        t, t_next, cond = self.time(k), self.time(k + 1), self.encode()
        if self.noisy[k]:
            return self.policy.transition(x, t, t_next, cond).mean
        return self.policy.solver(self.policy.velocity, x, t, t_next, cond, None)[0]

    def at(self, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (M, *D), t and dt (M,) where each sample's step k (M,) begins."""
        return self.path[torch.arange(len(k), device=k.device), k], self.t[k], self.t[k + 1] - self.t[k]

    def pull(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (M,) at x (M, *D), and `weight` (M,) times their gradients by x; 0 where there is no score."""
        x = x.detach().requires_grad_()
        reward = self.reward(x)
        (pull,) = torch.autograd.grad(reward, x, weight.to(reward))
        known = reward.detach().isfinite()
        return torch.where(known, reward.detach(), 0), torch.where(expand(known, pull), pull, 0)


class Through(ABC):
    """Base of the ways from the reward's gradient to the weights."""

    needs_reference: ClassVar[bool] = False

    @abstractmethod
    def kept(self, num_steps: int) -> int:
        """n, the last of `num_steps` denoising steps whose states a rollout is to keep."""

    @abstractmethod
    def check(self, policy: FlowPolicy, steps: Steps) -> None:
        """ValueError where the way does not exist for such samples."""

    @abstractmethod
    def passes(self, policy: FlowPolicy, plan: Plan) -> tuple[int, int]:
        """Network passes with a graph for each sample: of the reference, and of the live weights."""

    @abstractmethod
    def backward(self, samples: Samples) -> Tensor:
        """Add the samples' part of the mean's gradient to the weights' `.grad`; their part of the loss."""


def check_whole_steps(policy: FlowPolicy) -> None:
    """ValueError for a solver whose step cannot be taken again from its state alone."""
    x, t, cond = torch.zeros(1, 1), torch.zeros(1), Cond({"pooled": torch.zeros(1, 1)})
    if policy.solver(lambda x, t, dt, cond: x, x, t, t + 0.5, cond, None)[1] is not None:
        name = type(policy.solver).__name__
        raise ValueError(f"{name} reads the step before, a gradient goes back step by step: use policy.solver=euler")


def _check_deployed(name: str, n: int, policy: FlowPolicy, steps: Steps) -> None:
    if n > policy.num_steps:
        raise ValueError(f"{name} of n={n} steps, and policy.num_steps={policy.num_steps}: lower n")
    if steps.possible(policy.num_steps):
        raise ValueError(f"{name} differentiates the deployment sampler, which adds no noise: use steps=none")
    check_whole_steps(policy)


@dataclass(frozen=True)
class LastN(Through):
    """DRaFT-n: the gradient through the last n steps of the sampler; n = num_steps is plain backpropagation."""

    n: Size = 1

    def kept(self, num_steps: int) -> int:
        return self.n

    def check(self, policy: FlowPolicy, steps: Steps) -> None:
        _check_deployed("last_n", self.n, policy, steps)

    def passes(self, policy: FlowPolicy, plan: Plan) -> tuple[int, int]:
        return 0, self.n * policy.solver.calls

    def backward(self, samples: Samples) -> Tensor:
        """The loss is -R."""
        reward, pull = samples.pull(samples.path[:, -1], -samples.share)
        last = len(samples.noisy) - 1
        for k in range(last, last - self.n, -1):
            x = samples.path[:, k].detach().requires_grad_(k > last - self.n + 1)
            samples.mean(k, x).backward(pull)
            pull = x.grad if x.grad is not None else pull
        return -(samples.share * reward).sum()


@dataclass(frozen=True)
class ReFL(Through):
    """The reward of the one-step prediction x + (1 - t) v, where one of the last n steps, drawn anew, begins."""

    n: Size = 3

    def kept(self, num_steps: int) -> int:
        return self.n

    def check(self, policy: FlowPolicy, steps: Steps) -> None:
        _check_deployed("refl", self.n, policy, steps)

    def passes(self, policy: FlowPolicy, plan: Plan) -> tuple[int, int]:
        return 0, 1

    def backward(self, samples: Samples) -> Tensor:
        """The loss is -R."""
        k = len(samples.noisy) - self.n + (samples.uniform * self.n).long()
        x, t, _ = samples.at(k)
        predicted = data(x, samples.policy.velocity(x, t, 1 - t, samples.encode()), t)
        reward, pull = samples.pull(predicted, -samples.share)
        predicted.backward(pull)
        return -(samples.share * reward).sum()


class RewardGradient:
    """`update(rollout)` makes one optimiser step: after it the samples are of other weights.

    `reward` judges what the policy made, `kl` weighs the squared distance of the velocity to the un-tuned policy's at
    a random step of each sample. `permute` makes the control: a sample is judged by the next group's observation.
    """

    sample_with = "live"

    def __init__(
        self,
        policy: FlowPolicy,
        steps: Steps,
        groups: Groups,
        reward: Graded,
        through: Through | None = None,
        *,
        optimizer: AdamW | None = None,
        micro_batch: int = 48,
        kl: float = 0.0,
        ema_decay: float = 0.9,
        seed: int = 0,
        permute: bool = False,
    ):
        self.policy, self.steps, self.groups, self.reward = policy, steps, groups, reward
        self.through = through or LastN()
        self.through.check(policy, steps)
        if permute and groups.local < 2:
            raise ValueError("the control judges a sample by another group's prompt: a process needs 2 groups or more")
        self.keep_path = policy.num_steps if kl else self.through.kept(policy.num_steps)
        self.micro_batch, self.kl, self.ema_decay, self.seed, self.permute = micro_batch, kl, ema_decay, seed, permute
        self.optimizer = Optimizer([p for p in policy.parameters() if p.requires_grad], optimizer or AdamW())
        for name in ("ema", *(("ref",) if kl or self.through.needs_reference else ())):
            policy.weights.snapshot(name)
        self.iteration = 0

    # -- one iteration ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Nothing to do before the first iteration."""

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Improve the policy on one rollout, whose states were kept; returns metrics."""
        assert rollout.path is not None
        alive = (rollout.weight.flatten() > 0) & rollout.path.flatten(1).isfinite().all(1)
        share = 1 / dist.all_sum(alive.sum().double()).clamp(min=1)
        self.optimizer.zero_grad()
        sums = torch.zeros(2, dtype=torch.float64, device=share.device)
        for rows in alive.nonzero()[:, 0].split(self.micro_batch):
            samples = self._samples(rollout, rollout.path[rows], rows, share)
            sums[0] += self.through.backward(samples)
            if self.kl:
                sums[1] += self._kl_backward(samples)
        norm = self.optimizer.step()
        steps = self.optimizer.steps
        self.policy.weights.blend("ema", min(self.ema_decay, (1 + steps) / (10 + steps)))
        self.policy.field.unguided.observe(rollout.flat(rollout.obs))
        self.iteration += 1
        loss, kl = dist.all_sum(sums).tolist()
        metrics = {"policy/loss": loss, "optim/grad_norm": norm, "rollout/masked_frac": self._masked(share)}
        return metrics | ({"kl/ref": kl} if self.kl else {}) | self.optimizer.counters()

    def _masked(self, share: Tensor) -> float:
        return max(0.0, 1 - 1 / (float(share) * self.groups.total_rows))

    def _samples(self, rollout: Rollout, path: Tensor, rows: Tensor, share: Tensor) -> Samples:
        policy, n = self.policy, path.shape[1] - 1
        plan = self.steps(self.iteration, policy.grid(policy.num_steps), self.groups.row_ids())
        uniform = torch.rand(self.groups.total_rows, generator=generator("through", self.seed, self.iteration))
        judged = (rows + self.groups.group_size) % self.groups.num_rows if self.permute else rows
        return Samples(
            policy,
            encode=lambda: cond_of(policy, rollout, rows),
            reward=lambda x: self.reward(policy.squash(x), judged),
            path=path,
            t=plan.t[-n - 1 :].to(path),
            noisy=tuple(plan.noisy[-n:].tolist()),
            share=share.to(path).expand(len(rows)),
            uniform=uniform[rollout.row_ids.flatten()[rows.cpu()]].to(path.device),
        )

    def _kl_backward(self, samples: Samples) -> Tensor:
        """beta E|v - v_ref|^2, a mean over numbers."""
        x, t, dt = samples.at((samples.uniform * len(samples.noisy)).long())
        with torch.no_grad(), self.policy.using("ref"):
            ref = self.policy.velocity(x, t, dt, samples.encode())
        v = self.policy.velocity(x, t, dt, samples.encode())
        distance = (samples.share * reduce_events((v - ref).square(), "mean")).sum()
        (self.kl * distance).backward()
        return distance.detach()

    # -- state ------------------------------------------------------------------------------------

    def set_progress(self, progress: float) -> None:
        """Share of the run that is done, for schedules."""
        self.optimizer.progress = progress
        self.policy.kernel.set_progress(progress)

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs besides the policy and its weight sets."""
        return {"iteration": self.iteration, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.iteration = int(state["iteration"])
        self.optimizer.load_state_dict(state["optimizer"])
