"""A reward by rank inside its group, in place of another reward's value: only the order counts, outliers do not.

    rank_i = (number in the group below i - number above i) / (number of the others)        in [-1, 1]

For scores whose scale means little (aesthetics, judges), or one that a few samples run away with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlflow.rewards.component import column_names, make_reward, reads
from rlflow.rewards.scores import SomeRows, scored


class GroupRank:
    """Rank in [-1, 1] among the row's group under another reward, `of`, with its settings."""

    def __init__(self, of: str, settings: dict[str, Any] | None = None):
        self.of = make_reward(of, {of: settings or {}})
        self.columns = column_names(self.of)
        self.__signature__ = reads(list(dict.fromkeys([*self.columns, "group"])))

    def __call__(self, **columns: Any) -> Tensor:
        """(N,) rank; nan for a row without a score, or without another scored one in its group."""
        group: Tensor = columns["group"]
        given = {name: columns[name] for name in self.columns}
        scores, reason = scored(lambda: self.of(**given), len(group))
        if reason is not None:
            raise SomeRows(ranks(scores, group), reason)
        return ranks(scores, group)


def ranks(scores: Tensor, group: Tensor) -> Tensor:
    """(N,) rank of each score among those of its group."""
    group = group.to(scores.device)
    scored = ~scores.isnan()
    together = (group[:, None] == group[None]) & scored[:, None] & scored[None]
    wins = (scores[:, None] > scores[None]).long() - (scores[:, None] < scores[None]).long()
    others = together.sum(1) - scored.long()
    rank = (wins * together).sum(1) / others.clamp(min=1)
    return torch.where(scored & (others > 0), rank, torch.nan)
