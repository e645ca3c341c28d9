"""Rewards: plain functions called with the columns their signature names, composed into one number per row.

    total_n = sum_k w_k z_kn        z = score, or (score - mean_k) / std_k with normalize="reward"

A score that could not be had (None, nan, inf, an exception, a timeout, a wrong length) is masked and counted.
It is never zero: a zero enters the group's mean and teaches the policy something. MixGRPO (arXiv:2507.21802)
sums per-reward *advantages* instead: normalize="advantage" leaves the scores as they are for the learner,
which normalises every column and calls `RewardSet.combine`.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlflow.rewards.calls import Deadline, Pending, check_seconds
from rlflow.rewards.component import column_names, is_differentiable
from rlflow.rewards.meter import Meter
from rlflow.rewards.scores import Scores, scored
from rlflow.rewards.watch import Watch, own

log = logging.getLogger(__name__)

Normalize = Literal["none", "reward", "advantage"]
MAX_WARNINGS = 20


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """(N, 3, H, W) in [0, 1] to (N, H, W, 3) uint8 on the host; nan becomes 0 (RewardSet masks such rows)."""
    images = images.detach().float().nan_to_num(0.0).clamp(0, 1)
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


@dataclass(frozen=True)
class Reward:
    """A named reward function with its weight (0: logged only) and its time limit in seconds per batch (inf: none)."""

    name: str
    fn: Callable[..., Scores | None]
    weight: float = 1.0
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.name):
            raise ValueError(f"reward name {self.name!r}: use letters, digits, _ (it names a metric)")
        if not math.isfinite(self.weight):
            raise ValueError(f"reward {self.name!r}: weight must be finite, got {self.weight}")
        if self.timeout_s != math.inf:
            check_seconds(f"reward {self.name!r}: timeout_s", self.timeout_s)
        if not self.columns:
            raise ValueError(f"reward {self.name!r} reads no column: name its parameters images, prompt, ...")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns the function reads."""
        return column_names(self.fn)


class Elsewhere:
    """Base of rewards that wait for another machine: they are asked first, and the others computed meanwhile."""


def masked_moments(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased std of the entries that are not nan, in float64; 0 and 0 when there is none."""
    valid = ~scores.isnan()
    x = torch.where(valid, scores, 0).double()
    count = valid.sum().clamp(min=1)
    mean = x.sum() / count
    centred = torch.where(valid, x - mean, 0)
    return mean, (centred.square().sum() / count).sqrt()


def standardise(scores: Tensor, population: Tensor | None = None) -> Tensor:
    """(scores - mean) / std of `population` (default: scores); 0 when it is constant; nan stays nan."""
    mean, std = masked_moments(scores if population is None else population)
    centred = scores.double() - mean
    constant = std <= 1e-6 * mean.abs()  # rounding of one repeated number; an epsilon would break invariance
    z = torch.where(constant, torch.zeros_like(centred), centred / torch.where(constant, 1, std))
    return torch.where(scores.isnan(), torch.nan, z.float())


@dataclass
class RewardSet:
    """Several rewards over one batch; see the head of the file.

    `masked` and `errors` count rows without a score and failed calls over the set's life, `seconds` the time
    spent, `last_error` keeps the last message; all by reward name. `metrics()` reports since its last call.
    One batch is scored at a time (a lock) and one reward after the other, but for those Elsewhere: the functions
    need not be thread-safe, save against a call of their own that outlived its deadline.
    """

    rewards: Sequence[Reward]
    normalize: Normalize = "none"
    masked: dict[str, int] = field(init=False)
    errors: dict[str, int] = field(init=False)
    seconds: dict[str, float] = field(init=False)
    last_error: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        names = [r.name for r in self.rewards]
        if not names:
            raise ValueError("a RewardSet needs at least one reward")
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"reward names must differ, {twice} occur twice")
        if self.normalize not in get_args(Normalize):
            raise ValueError(f"normalize must be one of {get_args(Normalize)}, got {self.normalize!r}")
        self.masked, self.errors = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        self.seconds = dict.fromkeys(names, 0.0)
        self._call = {r.name: Deadline(r.name, r.fn, r.timeout_s) for r in self.rewards}
        self._meter = {n: Meter() for n in names}
        self._rows, self._invalid = 0, 0
        self._warned: set[tuple[str, str]] = set()
        self._spoilers: set[str] = set()
        self._lock = threading.Lock()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns the functions read, sorted."""
        return tuple(sorted({c for r in self.rewards for c in r.columns}))

    @property
    def weights(self) -> dict[str, float]:
        """Weight by reward name."""
        return {r.name: r.weight for r in self.rewards}

    def check_columns(self, available: Sequence[str]) -> None:
        """ValueError naming the reward, the unknown column and the nearest known one."""
        for r in self.rewards:
            for name in set(r.columns) - set(available):
                near = difflib.get_close_matches(name, list(available), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"reward {r.name!r} reads column {name!r}, known: {sorted(available)}{hint}")

    def compute(self, columns: Mapping[str, Any], num_rows: int) -> dict[str, Tensor]:
        """Score a batch: name -> (N,) float32 on the host, nan where there is no score.

        A reward that changes a tensor in place leaves this batch without any score, is named, and gets copies of its
        own from then on; a list it may change as it likes.
        """
        self.check_columns(list(columns))
        finite = _finite_rows(columns.get("frames", columns.get("images")), num_rows)
        with self._lock:
            watch = Watch(columns)
            asked = [r for r in self.rewards if isinstance(r.fn, Elsewhere)]
            pending = {r.name: self._call[r.name].start(self._given(r, columns)) for r in asked}
            found: dict[str, tuple[Tensor, float]] = {}
            spoilt = False
            for r in sorted(self.rewards, key=lambda r: r.name in pending):
                found[r.name] = self._score(r, columns, finite, pending.get(r.name))
                if not spoilt and (changed := watch.changed()):
                    spoilt = True
                    self._spoils(r.name, changed, num_rows)
            nothing = torch.full((num_rows,), torch.nan)
            scores = {r.name: nothing if spoilt else found[r.name][0] for r in self.rewards}
            for name, values in scores.items():
                self._count(name, values, found[name][1])
            return scores

    def _given(self, r: Reward, columns: Mapping[str, Any]) -> dict[str, Any]:
        return own(columns, r.columns, copy_tensors=r.name in self._spoilers)

    def _score(
        self, r: Reward, columns: Mapping[str, Any], finite: Tensor, pending: Pending | None
    ) -> tuple[Tensor, float]:
        """Scores (N,) and the seconds they took."""
        num_rows, start = len(finite), time.perf_counter()
        try:
            scores, reason = scored(pending or (lambda: self._call[r.name](self._given(r, columns))), num_rows)
            if reason is not None:
                self._failed(r.name, reason, int(scores.isnan().sum()))
        except Exception as error:  # whatever user code raises: the batch has no score, training goes on
            scores = torch.full((num_rows,), torch.nan)
            self._failed(r.name, f"{type(error).__name__}: {error}", num_rows)
        spent = pending.spent if pending else time.perf_counter() - start
        return torch.where(finite, scores, torch.nan), spent

    def _spoils(self, name: str, changed: Sequence[str], num_rows: int) -> None:
        self._spoilers.add(name)
        said = f"it changes {', '.join(changed)} in place, which other rewards read: no score of this batch counts"
        self._failed(name, f"{said}, and it gets copies of its own from now on (or let it change a clone)", num_rows)

    def _count(self, name: str, scores: Tensor, seconds: float) -> None:
        self.masked[name] += int(scores.isnan().sum())
        self.seconds[name] += seconds
        self._meter[name].add(scores, seconds)

    def _failed(self, name: str, message: str, num_rows: int) -> None:
        self.errors[name] += 1
        self._meter[name].errors += 1
        self.last_error[name] = message
        kind = (name, re.sub(r"\d+", "#", message))  # the same error with other numbers is not news
        if kind not in self._warned and len(self._warned) < MAX_WARNINGS:
            self._warned.add(kind)
            log.warning("reward %r failed, %d rows masked (said once per error): %s", name, num_rows, message)

    def combine(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Weighted sum (N,) of per-reward columns, nan where invalid, and valid (N,): no part is nan."""
        weighted = [r for r in self.rewards if r.weight != 0]
        if not weighted:
            raise ValueError("every reward has weight 0: give at least one a weight")
        stacked = torch.stack([parts[r.name].float() for r in weighted])
        weights = torch.tensor([r.weight for r in weighted], device=stacked.device).unsqueeze(1)
        valid = ~stacked.isnan().any(0)
        total = (weights * torch.where(stacked.isnan(), 0, stacked)).sum(0)
        return torch.where(valid, total, torch.nan), valid

    def total(
        self, scores: Mapping[str, Tensor], population: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reward (N,) and valid (N,) bool.

        `population` holds the scores from which normalize="reward" takes its mean and std when `scores`
        is only a part of them (a micro-batch, one rank).
        """
        if self.normalize == "reward":
            whole = scores if population is None else population
            scores = {n: standardise(scores[n], whole[n]) for n in self.weights}
        reward, valid = self.combine(scores)
        self._rows += len(valid)
        self._invalid += int((~valid).sum())
        return reward, valid

    def check_graded(self) -> None:
        """ValueError unless the weighted sum has a gradient: names the reward that has none, and the fix."""
        if self.normalize != "none":
            raise ValueError(
                f"normalize={self.normalize!r} compares a batch's scores, a gradient is of each image's own: use none"
            )
        for r in self.rewards:
            if r.weight and not is_differentiable(r.fn):
                raise ValueError(
                    f"reward {r.name!r} gives no gradient by the images: give it weight 0, which logs it, or declare "
                    "it @differentiable (rlflow.rewards.component) and compute it in tensors"
                )

    def graded(self, columns: Mapping[str, Any], num_rows: int) -> Tensor:
        """Weighted sum (N,) of what `check_graded` allows, with a graph to the images; nan where one has no score.

        Nothing is logged, and an error is the caller's.
        """
        self.check_graded()
        total = torch.zeros(num_rows, device=columns.get("frames", columns.get("images")).device)
        for r in self.rewards:
            if r.weight:
                total = total + r.weight * _with_graph(r.name, r.fn(**self._given(r, columns)), num_rows).to(total)
        return total

    def metrics(self) -> dict[str, float]:
        """reward/<name>/{mean,std,masked_frac,seconds,errors} and reward/masked_frac since the last call."""
        out: dict[str, float] = {}
        for name, meter in self._meter.items():
            out |= meter.metrics(f"reward/{name}")
        if self._rows:
            out["reward/masked_frac"] = self._invalid / self._rows
        self._meter = {n: Meter() for n in self._meter}
        self._rows, self._invalid = 0, 0
        return out


def _with_graph(name: str, scores: Any, num_rows: int) -> Tensor:
    """The scores (N,) of a reward that was declared differentiable; ValueError where they are not."""
    if not isinstance(scores, Tensor) or scores.shape != (num_rows,) or not scores.requires_grad:
        what = f"{type(scores).__name__} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else repr(scores)
        raise ValueError(
            f"reward {name!r} is declared differentiable and returned {what[:60]} without a graph to the images for "
            f"{num_rows} rows: return a tensor ({num_rows},) made of them in tensors, under no no_grad"
        )
    return scores


def _finite_rows(images: Any, num_rows: int) -> Tensor:
    """(N,) bool: False where an image, or a video, holds nan or inf, which no function may judge."""
    if not isinstance(images, Tensor):
        return torch.ones(num_rows, dtype=torch.bool)
    return images.detach().isfinite().flatten(1).all(1).cpu()
