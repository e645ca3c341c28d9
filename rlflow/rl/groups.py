"""Which seeds and groups an iteration uses: pure functions of (seed, iteration), independent of the world size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """`num_groups` groups of `group_size` rows an iteration; a rank takes whole groups in order.

    Group g of iteration i has the serial number i * num_groups + g, the seed of its episodes: an
    environment turns serial numbers into prompts or start states without repeats.
    """

    num_groups: int
    group_size: int
    rank: int = 0
    world: int = 1

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
        return iteration * self.num_groups + self.group_ids()

    def minibatches(self, horizon: int, num: int, uniform: Tensor) -> list[Tensor]:
        """Split the local T * B rows into `num` minibatches, stratified so that every rank has equal shares.

        Blocks of `num` neighbouring groups are shuffled by `uniform` (T, num_groups), one member to each
        minibatch, so the global minibatches do not depend on the world size.
        """
        if num == 1:
            return [torch.arange(horizon * self.num_rows)]
        if self.local % num:
            raise ValueError(f"num_minibatches={num} must divide the {self.local} groups of each process")
        mine = uniform[:, self.rank * self.local : (self.rank + 1) * self.local].reshape(horizon, -1, num)
        order = mine.argsort(-1) + torch.arange(0, self.local, num)[:, None]
        rows = order.permute(2, 0, 1).unsqueeze(-1) * self.group_size + torch.arange(self.group_size)
        rows = rows + torch.arange(horizon)[:, None, None] * self.num_rows
        return list(rows.reshape(num, -1))
