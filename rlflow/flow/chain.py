"""The state of one sampled chain: a step at a time, by the kernel where it is noisy and else by the solver."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlflow.flow.noise import Key, noise
from rlflow.flow.path import expand
from rlflow.flow.solvers import Velocity
from rlflow.flow.steps import Plan
from rlflow.types import Chain, Cond, tree_map

if TYPE_CHECKING:
    from rlflow.flow.policy import FlowPolicy


class Sampling:
    """The state of one `sample` call: x, solver memory, and the pairs recorded so far."""

    def __init__(
        self, policy: FlowPolicy, plan: Plan, key: Key, row_ids: Tensor, keep_path: bool, step_noise: Tensor | None
    ):
        self.policy, self.plan, self.key, self.row_ids, self.given = policy, plan, key, row_ids, step_noise
        self.device, self.dtype = policy.device, policy.dtype  # each asks the first parameter: once per chain
        self.times = plan.t.to(self.dtype).to(self.device, non_blocking=True)  # a copy that waits for no GPU
        self.noisy = plan.noisy.to(self.device, non_blocking=True)
        self.velocity: Velocity = policy.with_spread if policy.solver.needs_spread else policy.velocity
        self.memory: object = None
        self.pairs: list[tuple[Tensor, ...]] = []
        self.path: list[tuple[Tensor, Tensor]] | None = [] if keep_path else None

    def noise(self, purpose: str, k: int, row_ids: Tensor) -> Tensor:
        """(N, *D) of a purpose, "x_0" or "step", at step k."""
        if self.given is not None and purpose == "step":
            return self.given[k]
        key = self.key._replace(purpose=f"{self.key.purpose}/{purpose}", k=k)
        return noise(key, row_ids, self.policy.event_shape, self.dtype, self.device)

    def time(self, k: int, num: int) -> Tensor:
        """(N,) of `num` rows at the point k of the grid."""
        return self.times[k].expand(num) if self.times.ndim == 1 else self.times[:, k]

    def advance(self, x: Tensor, cond: Cond, ks: range) -> None:
        """Sampling the steps `ks` from x."""
        self.x = x
        for k in ks:
            t, t_next = self.time(k, len(self.x)), self.time(k + 1, len(self.x))
            if self.plan.noisy[..., k].any():
                self.x = self._stored(self.x)  # both ends of a pair are kept
            self._remember(t)
            if self.plan.noisy.ndim == 2:
                self._mixed(k, t, t_next, cond)
            elif self.plan.noisy[k]:
                self._stochastic(k, t, t_next, cond)
            else:
                self.x, self.memory = self.policy.solver(self.velocity, self.x, t, t_next, cond, self.memory)
        self.end = self.time(self.plan.num_steps, len(self.x))

    def _remember(self, t: Tensor) -> None:
        if self.path is not None:
            self.path.append((self.x, t))

    def _stored(self, x: Tensor) -> Tensor:
        """Rounded to the storage dtype: the chain continues from the value that will be scored."""
        storage = self.policy.storage_dtype
        return x if storage is None else x.to(storage).to(x.dtype)

    def _stochastic(self, k: int, t: Tensor, t_next: Tensor, cond: Cond) -> None:
        dist = self.policy.transition(self.x, t, t_next, cond)
        x_next = self._stored(dist.sample(self.noise("step", k, self.row_ids)))
        self.pairs.append((self.x, x_next, t, t_next, dist.mean, dist.std, *self._constant()))
        self.x, self.memory = x_next, None

    def _mixed(self, k: int, t: Tensor, t_next: Tensor, cond: Cond) -> None:
        """Noisy for some rows, Euler for the others, with one network call."""
        policy, noisy = self.policy, self.noisy[:, k]
        dt = torch.where(noisy, policy.kernel_dt(t, t_next), t_next - t)
        v = policy.velocity(self.x, t, dt, cond)
        dist = policy.kernel_step(self.x, v, t, t_next, cond)
        x_next = self._stored(dist.sample(self.noise("step", k, self.row_ids)))
        self.pairs.append((self.x, x_next, t, t_next, dist.mean, dist.std, *self._constant()))
        self.x = torch.where(expand(noisy, v), x_next, self.x + expand(t_next - t, v) * v)

    def _constant(self) -> list[Tensor]:
        """What the field gave that gradients leave out, if anything; passes may have been filled up."""
        given = self.policy.field.constant
        return [] if given is None or torch.is_grad_enabled() else [given[: len(self.x)]]

    def repeat(self, copies: int) -> None:
        """One row becomes `copies` rows."""

        def again(v: Tensor) -> Tensor:
            return v.repeat_interleave(copies, 0)

        self.x, self.memory = again(self.x), tree_map(again, self.memory)
        if self.path is not None:
            self.path = [(again(x), again(t)) for x, t in self.path]

    def chain(self) -> Chain:
        """Everything recorded, with the scored columns only."""
        path = path_t = None
        if self.path is not None:
            self._remember(self.end)
            path, path_t = (torch.stack(z, 1) for z in zip(*self.path, strict=True))
        x, x_next, t, t_next, mean, std, *constant = self._columns()
        return Chain(self.x, x, x_next, t, t_next, mean, std, path, path_t, *constant)

    def _columns(self) -> list[Tensor]:
        if not self.pairs or self.plan.num_scored == 0:
            empty = self.x.new_empty((len(self.x), 0, *self.x.shape[1:]))
            return [empty, empty, empty.flatten(2)[:, :, 0], empty.flatten(2)[:, :, 0], empty, empty]
        stacked = [torch.stack(z, 1) for z in zip(*self.pairs, strict=True)]
        ran = self.plan.noisy if self.plan.noisy.ndim == 1 else torch.ones(self.plan.num_steps, dtype=torch.bool)
        if self.plan.scored.ndim == 1:
            if bool(self.plan.scored[ran].all()):
                return stacked
            return [z[:, self.plan.scored[ran].nonzero()[:, 0]] for z in stacked]
        columns = self.plan.scored[:, ran].nonzero()[:, 1].reshape(len(self.x), -1).to(self.x.device)
        rows = torch.arange(len(self.x), device=self.x.device).unsqueeze(-1)
        return [z[rows, columns] for z in stacked]
