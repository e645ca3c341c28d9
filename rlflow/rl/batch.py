"""What one update works on: a flattened rollout, pieces of it, and a meter that sums over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from rlflow.flow.policy import FlowPolicy
from rlflow.parallel import dist
from rlflow.rl.advantages import Advantages
from rlflow.rl.anchor import Anchor
from rlflow.rl.masked import weighted_sum
from rlflow.types import Cond, Evidence, Rollout, tree_map


@dataclass(frozen=True)
class Pairs:
    """Rows (M,) with all their columns, or with one column each (M,)."""

    rows: Tensor
    columns: Tensor | None


def cond_of(policy: FlowPolicy, rollout: Rollout, rows: Tensor) -> Cond:
    """Cond of rows (M,): kept from the rollout when the encoder is frozen, else encoded now."""
    if rollout.cond is not None:
        return rollout.cond.index(rows)
    unique, inverse = torch.unique(rows, return_inverse=True) if rows.numel() > 1 else (rows, rows * 0)
    return policy.encode(tree_map(lambda v: v[unique], rollout.flat(rollout.obs))).index(inverse)


class Rows:
    """N rows of evidence with their advantages (N, 1 or R) and weights (N,)."""

    def __init__(self, evidence: Evidence, row_alive: Tensor):
        self.evidence, self.row_alive = evidence, row_alive
        self.advantage, self.row_weight = row_alive, row_alive  # until they are known

    def evidence_of(self, pairs: Pairs) -> Evidence:
        """(M, R, ...) of whole rows or (M, 1, ...) of single pairs."""
        if pairs.columns is None:
            return self.evidence.index(pairs.rows)
        return self.evidence.pairs(pairs.rows, pairs.columns)

    def advantage_of(self, pairs: Pairs) -> Tensor:
        """(M, 1), of rows or single pairs, or (M, R) where each column of whole rows has its own."""
        advantage = self.advantage[pairs.rows]
        if pairs.columns is None or advantage.shape[1] == 1:
            return advantage
        return advantage.gather(1, pairs.columns.unsqueeze(1))

    def _valid(self, pairs: Pairs) -> Tensor:
        valid = self.evidence.valid[pairs.rows]
        return valid if pairs.columns is None else valid.gather(1, pairs.columns.unsqueeze(1))

    def pair_weight(self, pairs: Pairs, joint: bool) -> Tensor:
        """(M, R) weights of pairs with a usable advantage; (M, 1) for joint ratios."""
        weight = self.row_weight[pairs.rows].unsqueeze(1)
        return weight if joint else weight * self._valid(pairs)

    def alive(self, pairs: Pairs) -> Tensor:
        """(M, R) weights of every sampled pair, zero advantage or not: what the KL term averages over."""
        return self.row_alive[pairs.rows].unsqueeze(1) * self._valid(pairs)


EVERY = Pairs(cast("Tensor", slice(None)), None)
"""All columns of all rows, none of them copied."""


class Batch(Rows):
    """One rollout, flattened to N rows, with its advantages and (if asked for) reference means."""

    anchor: Anchor | None = None

    def __init__(self, policy: FlowPolicy, rollout: Rollout):
        assert rollout.evidence is not None
        super().__init__(rollout.evidence, rollout.weight.reshape(-1))
        self.policy, self.rollout = policy, rollout
        self.num_columns = self.evidence.t.shape[1]

    def constant_of(self, pairs: Pairs) -> Tensor | None:
        """(M, R or 1, *D) of what sampling kept of guidance's constant half, if it kept it."""
        kept = self.rollout.constant
        if kept is None or pairs.columns is None:
            return None if kept is None else kept[pairs.rows]
        return kept[pairs.rows, pairs.columns].unsqueeze(1)

    def set_advantages(self, out: Advantages, joint: bool) -> None:
        """Flatten advantages (T, B) or (T, B, R), of rows or of each column, and weights (T, B) to rows."""
        self.advantage = out.advantage.reshape(len(self.row_alive), -1)
        if self.advantage.shape[1] not in ((1,) if joint else (1, self.num_columns)):
            raise ValueError(
                f"advantages are of {self.advantage.shape[1]} columns, the evidence "
                + (
                    "is joint: give one for each row, or set likelihood.joint=false"
                    if joint
                    else f"has {self.num_columns}"
                )
            )
        self.row_weight = out.weight.reshape(-1)
        if out.returns is not None:
            self.returns = out.returns.reshape(-1)
        self.metrics = self._metrics()

    def cond(self, rows: Tensor) -> Cond:
        """Cond of rows (M,): kept from the rollout when the encoder is frozen, else encoded now."""
        return cond_of(self.policy, self.rollout, rows)

    def denominator(self, rows: Tensor) -> Tensor:
        """Global sums (4,): pair weights, joint weights, alive pairs, alive rows."""
        everything = Pairs(rows, None)
        local = [
            self.pair_weight(everything, False),
            self.pair_weight(everything, True),
            self.alive(everything),
            self.row_alive[rows],
        ]
        return dist.all_sum(torch.stack([w.sum() for w in local]))

    def _metrics(self) -> dict[str, float]:
        """Share of rows that took part, and the size of their advantages; over all ranks."""
        used = (self.row_weight > 0).to(self.row_alive.dtype)
        masked = (self.row_alive == 0).to(used.dtype)
        size = weighted_sum(self.advantage.abs().mean(1), self.row_weight)
        sums = torch.stack([used.sum(), masked.sum(), size, self.row_weight.sum(), torch.ones_like(used).sum()])
        used_sum, masked_sum, size_sum, weight_sum, total = dist.all_sum(sums).tolist()
        return {
            "advantage/used_frac": used_sum / total,
            "advantage/abs_mean": size_sum / max(weight_sum, 1e-12),
            "rollout/masked_frac": masked_sum / total,
        }


class Meter:
    """Sums of per-micro-batch numbers, kept on the device; reduced over ranks once per epoch or iteration."""

    def __init__(self) -> None:
        self.history: list[dict[str, Tensor]] = []
        self.norms: list[float] = []
        self.first: Tensor | None = None

    def begin(self, sums: Tensor, first: bool) -> None:
        self.sums = sums
        self.values: dict[str, Tensor] = {}
        self.alive, self.rows = sums[2:].clamp(min=1e-12)
        self.is_first = first

    def denominator(self, joint: bool) -> Tensor:
        return self.sums[1 if joint else 0].clamp(min=1e-12)

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self.values[name] = self.values[name] + value if name in self.values else value

    def first_ratio(self, diff: Tensor) -> None:
        """Largest |log ratio| before any weight has changed, per column."""
        if self.is_first:
            worst = diff.abs().amax(0)
            same = self.first is not None and self.first.shape == worst.shape
            self.first = torch.maximum(self.first, worst) if self.first is not None and same else worst

    def end(self, grad_norm: float) -> None:
        """One optimiser step is over; its norm is nan when it was skipped."""
        self.history.append(self.values)
        self.norms.append(grad_norm)

    def mean(self, name: str, last: int) -> float:
        """Of a logged number over the last optimiser steps, over all ranks."""
        return float(dist.all_sum(torch.stack([row[name] for row in self.history[-last:]]).mean()))

    def metrics(self) -> dict[str, float]:
        """Means over the iteration's optimiser steps, and the first log-ratio."""
        names = sorted(self.history[0])
        table = dist.all_sum(torch.stack([torch.stack([row[n] for n in names]) for row in self.history]))
        out = dict(zip(names, table.nanmean(0).tolist(), strict=True))
        norms = torch.tensor(self.norms, dtype=torch.float64)
        if self.first is not None or not norms.isnan().all():  # else nothing but the critic took a step
            out["optim/grad_norm"] = float(norms.nanmean())
        if self.first is None:
            return out
        by_step = dist.all_max(self.first)
        out |= {f"policy/first_log_ratio/{k}": worst for k, worst in enumerate(by_step.tolist())}
        return out | {"policy/first_log_ratio_max": float(by_step.max())}
