"""AdamW with warm-up and cosine decay, one global gradient clip, and steps that a bad gradient cannot spoil."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.parallel import dist, shards


class NonFiniteError(FloatingPointError):
    """Several optimiser steps in a row had a non-finite loss or gradient, or a weight is no longer finite."""


@dataclass(frozen=True)
class AdamW:
    """Settings of the optimiser; `warmup` in optimiser steps, `cosine` decays to `final` x lr over the run."""

    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    warmup: int = 0
    cosine: bool = False
    final: float = 0.1
    max_bad_steps: int = 5


class Moments:
    """Adam's averages, and its fused step over all parameters of a device and dtype (Loshchilov and Hutter 2019).

    torch.optim's, whose state it keeps, spends as long on its lists as on the numbers of a small network.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: AdamW):
        self.parameters, self.config = list(parameters), config
        self.state: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(self.parameters)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], lr: float, skip: Tensor | None = None) -> None:
        """One step, of which nothing is left where `skip` (), a float on the device, is 1."""
        c, groups = self.config, dict[tuple[torch.device, torch.dtype], list[int]]()
        there = {i: gradient for i, gradient in enumerate(gradients) if gradient is not None}
        for i in there:
            p = self.parameters[i]
            if self.state[i] is None:
                self.state[i] = torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device)
            groups.setdefault((p.device, p.dtype), []).append(i)
        for (device, _), group in groups.items():
            first, second, steps = zip(*(state for i in group if (state := self.state[i])), strict=True)
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                [self.parameters[i] for i in group], [there[i] for i in group], first, second, [], steps,
                lr=lr, beta1=c.betas[0], beta2=c.betas[1], weight_decay=c.weight_decay, eps=c.eps, amsgrad=False,
                maximize=False, grad_scale=None, found_inf=None if skip is None else skip.to(device),
            )  # fmt: skip
            if skip is not None:
                torch._foreach_sub_(steps, [skip.to(device)] * len(steps))

    def state_dict(self) -> dict[str, Tensor]:
        """'number of the parameter/what' to a tensor; nothing of those that were never stepped."""
        names = ("exp_avg", "exp_avg_sq", "step")
        found = ((i, state) for i, state in enumerate(self.state) if state is not None)
        return {f"{i}/{name}": value for i, state in found for name, value in zip(names, state, strict=True)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.state = [None] * len(self.parameters)
        for i, p in enumerate(self.parameters):
            if f"{i}/step" in state:
                first, second = (state[f"{i}/{name}"].to(p, copy=True) for name in ("exp_avg", "exp_avg_sq"))
                self.state[i] = first, second, state[f"{i}/step"].to(p.device, torch.float32, copy=True)


class Optimizer:
    """Steps `parameters` from gradients summed over ranks; skips, counts and finally refuses bad ones.

    `setting` is what an error says to lower.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: AdamW, setting: str = "algorithm.optimizer.lr"):
        if not parameters:
            raise ValueError("nothing to train: no parameter has requires_grad")
        self.config, self.parameters, self.setting = config, list(parameters), setting
        self.parts = [nn.Parameter(shards.local(p)) if shards.is_sharded(p) else p for p in self.parameters]
        """What this process steps: the parameters, or its parts of them."""
        self.adam = Moments(self.parts, config)
        self.steps, self.skipped, self.bad_in_a_row, self.progress = 0, 0, 0, 0.0

    def learning_rate(self) -> float:
        """Warm-up by optimiser steps times cosine by progress in [0, 1]."""
        c = self.config
        warm = min(1.0, (self.steps + 1) / c.warmup) if c.warmup else 1.0
        decay = c.final + (1 - c.final) * 0.5 * (1 + math.cos(math.pi * self.progress)) if c.cosine else 1.0
        return c.lr * warm * decay

    def counters(self) -> dict[str, float]:
        """For the log."""
        return {
            "optim/lr": self.learning_rate(),
            "optim/steps": float(self.steps),
            "optim/skipped_steps": float(self.skipped),
        }

    def zero_grad(self) -> None:
        """Drop gradients."""
        for p in (*self.parameters, *self.parts):
            p.grad = None

    def step(self) -> float:
        """Reduce over ranks, clip, step; returns the gradient norm (nan when the step was skipped, 0 for no gradient).

        Raises NonFiniteError after `max_bad_steps` skipped steps in a row.
        """
        norm = self._reduce()
        if not bool(torch.isfinite(norm)):
            self._skip()
            return math.nan
        self.bad_in_a_row = 0
        if norm == 0:  # every sample is masked: Adam's momentum and weight decay would move the weights all the same
            return 0.0
        if self.config.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parts, self.config.max_grad_norm, norm)
        self.adam.step([p.grad for p in self.parts], self.learning_rate())
        self.steps += 1
        return float(norm)

    def _reduce(self) -> Tensor:
        """Sum gradients over ranks, those of sharded parameters are so already; the norm of them all."""
        pairs = list(zip(self.parameters, self.parts, strict=True))
        kept = [p for p, mine in pairs if p is mine]
        dist.sum_gradients(kept)
        norm = nn.utils.get_total_norm([p.grad for p in kept if p.grad is not None])
        if len(kept) == len(pairs):
            return norm
        shared = [(p, mine) for p, mine in pairs if p is not mine]
        for p, mine in shared:
            mine.grad = torch.zeros_like(mine) if p.grad is None else shards.local(p.grad)
        square = nn.utils.get_total_norm([mine.grad for _, mine in shared if mine.grad is not None]).square()
        return (dist.all_sum(square) + norm.to(square).square()).sqrt()

    def _skip(self) -> None:
        self.skipped += 1
        self.bad_in_a_row += 1
        self.zero_grad()
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise NonFiniteError(
                f"{self.bad_in_a_row} optimiser steps in a row had a non-finite loss or gradient: "
                f"lower {self.setting} or look for a reward that explodes"
            )

    def state_dict(self) -> dict[str, Any]:
        """Tensors of Adam plus counters; every process has to ask."""
        counters = {"steps": self.steps, "skipped": self.skipped, "bad_in_a_row": self.bad_in_a_row}
        moments = {key: self._whole(int(key.partition("/")[0]), v) for key, v in self.adam.state_dict().items()}
        return {"moments": moments, "counters": counters}

    def _whole(self, index: int, value: Tensor) -> Tensor:
        """A moment; the count of steps has no axis and is everyone's."""
        return shards.whole(self.parameters[index], value) if value.ndim else value

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        moments = state["moments"].items()
        self.adam.load_state_dict(
            {k: shards.part(self.parameters[int(k.partition("/")[0])], v) if v.ndim else v for k, v in moments}
        )
        for name, value in state["counters"].items():
            setattr(self, name, int(value))


class Deferred(Optimizer):
    """The same steps for learners that make thousands: bad ones are skipped and counted on the device, unseen.

    `settle` reads the counters, once per iteration.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: AdamW, setting: str = "algorithm.optimizer.lr"):
        super().__init__(parameters, config, setting)
        self._bad: list[Tensor] = []  # 1 for a step that was skipped, since the last time that anybody looked

    def advance(self, gradients: Sequence[Tensor | None] | None = None) -> Tensor:
        """Clip, step by these gradients or the parameters' own; returns their norm, a tensor nobody waits for."""
        gradients = [p.grad for p in self.parameters] if gradients is None else gradients
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([g for g in gradients if g is not None])))
        bad = (norm - norm).ne_(0)
        if self.config.max_grad_norm > 0:
            share = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = [None if g is None else g * share for g in gradients]
        self.adam.step(gradients, self.learning_rate(), bad.float())
        self.steps += 1
        self._bad.append(bad)
        return norm

    def settle(self) -> None:
        """Read what was skipped since the last time; NonFiniteError after `max_bad_steps` in a row."""
        bad = torch.stack(self._bad).bool().tolist() if self._bad else []
        self._bad = []
        for one in bad:
            self.bad_in_a_row = self.bad_in_a_row + 1 if one else 0
        self.skipped += sum(bad)
        self.steps -= sum(bad)
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise NonFiniteError(
                f"{self.bad_in_a_row} optimiser steps in a row had a non-finite loss or gradient: "
                f"lower {self.setting} or look for a reward that explodes"
            )
