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


def _bare(method: Any) -> Any:
    """A method of torch.optim without the switches for torch.compile around it, whose import takes a CPU second."""
    return getattr(method, "__wrapped__", method)


class EagerAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, which is never compiled here."""

    add_param_group = _bare(torch.optim.Optimizer.add_param_group)
    state_dict = _bare(torch.optim.Optimizer.state_dict)
    load_state_dict = _bare(torch.optim.Optimizer.load_state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As torch.optim.AdamW."""
        return _bare(torch.optim.Adam.step)(self, closure)


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
        self.adam = self._adam()
        self.steps, self.skipped, self.bad_in_a_row, self.progress = 0, 0, 0, 0.0

    def _adam(self, fused: bool | None = None) -> torch.optim.AdamW:
        c = self.config
        return EagerAdamW(self.parts, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay, eps=c.eps, fused=fused)

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
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate()
        self.adam.step()
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
        state = self.adam.state_dict()["state"]
        moments = {f"{i}/{k}": self._whole(i, v) for i, s in state.items() for k, v in s.items()}
        return {"moments": moments, "counters": counters}

    def _whole(self, index: int, value: Tensor) -> Tensor:
        """A moment; the count of steps has no axis and is everyone's."""
        return shards.whole(self.parameters[index], value) if value.ndim else value

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        full = self.adam.state_dict()
        full["state"] = {}
        for key, value in state["moments"].items():
            index, _, name = key.partition("/")
            mine = shards.part(self.parameters[int(index)], value) if value.ndim else value
            full["state"].setdefault(int(index), {})[name] = mine
        self.adam.load_state_dict(full)
        for name, value in state["counters"].items():
            setattr(self, name, int(value))


class Deferred(Optimizer):
    """The same steps for learners that make thousands: bad ones are skipped and counted on the device, unseen.

    `settle` reads the counters, once per iteration.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: AdamW, setting: str = "algorithm.optimizer.lr"):
        super().__init__(parameters, config, setting)
        self.adam = self._adam(fused=True)
        self._total, self._row = torch.zeros(2, dtype=torch.long, device=self.parameters[0].device)

    def advance(self) -> Tensor:
        """Clip, step; returns the gradient norm, a tensor, which nobody waits for."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        bad = ~norm.isfinite()
        if self.config.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm)
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate()
        self.adam.found_inf = bad.float()  # type: ignore[attr-defined]  # fused kernels leave everything as it was where this is 1
        self.adam.step()
        self.steps += 1
        self._total += bad
        self._row = torch.where(bad, self._row + 1, 0)
        return norm

    def settle(self) -> None:
        """Read what was skipped since the last time; NonFiniteError after `max_bad_steps` in a row."""
        self.bad_in_a_row, new = int(self._row), int(self._total)
        self._total.zero_()
        self.skipped += new
        self.steps -= new
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise NonFiniteError(
                f"{self.bad_in_a_row} optimiser steps in a row had a non-finite loss or gradient: "
                f"lower {self.setting} or look for a reward that explodes"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        super().load_state_dict(state)
        self._row.fill_(self.bad_in_a_row)
