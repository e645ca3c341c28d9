"""Which seeds and groups an iteration uses: pure functions of (seed, iteration), independent of the world size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlflow.envs.seeds import TRAINING


@dataclass(frozen=True)
class Groups:
    """`num_groups` groups of `group_size` rows an iteration; a rank takes whole groups in order.

    Group g of iteration i has the serial number first + i * num_groups + g, the seed of its episodes: an
    environment turns serial numbers into prompts or start states without repeats.
    """

    num_groups: int
    group_size: int
    rank: int = 0
    world: int = 1
    first: int = 0

    def __post_init__(self) -> None:
        if self.num_groups < 1 or self.group_size < 1:
            raise ValueError(f"need at least one group of one row, got {self.num_groups} x {self.group_size}")
        if self.num_groups % self.world:
            raise ValueError(
                f"{self.num_groups} groups cannot be shared by {self.world} processes in whole groups: "
                f"set num_groups to a multiple of {self.world}"
            )

    @property
    def local(self) -> int:
        """Groups of this rank."""
        return self.num_groups // self.world

    @property
    def num_rows(self) -> int:
        """B, rows of this rank."""
        return self.local * self.group_size

    @property
    def total_rows(self) -> int:
        """Rows of all ranks."""
        return self.num_groups * self.group_size

    def row_ids(self) -> Tensor:
        """Global row ids (B,), on the CPU."""
        return torch.arange(self.num_rows) + self.rank * self.num_rows

    def group_ids(self) -> Tensor:
        """Global group of each row (B,)."""
        return self.row_ids() // self.group_size

    def seeds(self, iteration: int) -> Tensor:
        """Serial number of each row's group (B,)."""
        return (self.first + iteration * self.num_groups + self.group_ids()) % TRAINING

    def check_minibatches(self, horizon: int, num: int) -> None:
        """ValueError where a rank could be left without rows in one of `num` minibatches."""
        mine = self.local * horizon
        if num > mine or (self.world > 1 and mine % num and mine < 2 * num - 1):
            raise ValueError(
                f"num_minibatches={num} leaves a process without rows: it has {mine} groups at a step; "
                f"use at most {mine if self.world == 1 else max(1, (mine + 1) // 2)} minibatches"
            )

    def minibatches(self, horizon: int, num: int, uniform: Tensor) -> list[Tensor]:
        """Split the local T * B rows into `num` minibatches of equal size, but for one unit of a group at a step.

        Units are ordered by group and then by step, so that a rank has a run of them; each block of `num`
        neighbours is dealt one to each minibatch, in the order of `uniform` (num_groups * T,). The global
        minibatches do not depend on the world size. ValueError as in `check_minibatches`.
        """
        self.check_minibatches(horizon, num)
        mine, first = self.local * horizon, self.rank * self.local * horizon
        filled = torch.cat([uniform, uniform[: -len(uniform) % num]])  # the last block is as random as the others
        owner = filled.view(-1, num).argsort(-1).argsort(-1).flatten()[first : first + mine]
        unit = torch.arange(mine)
        row = (unit % horizon) * self.num_rows + unit // horizon * self.group_size
        rows = row[:, None] + torch.arange(self.group_size)
        return [rows[owner == i].flatten() for i in range(num)]
