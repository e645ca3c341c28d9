"""A reward as the scorer of a choice among samples: best-of-N by anything that scores pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlflow.rewards.base import Reward, RewardSet
from rlflow.rewards.frames import made_column, made_columns


class RewardScorer:
    """Scores n pictures of each of N rows by one reward; the pictures of a row are a group.

    ValueError where the reward reads what the prompt table, of these `columns` where they are known, does not have.
    """

    def __init__(self, reward: Reward, columns: Sequence[str] | None = None, videos: bool = False):
        self.name, self.rewards = reward.name, RewardSet([reward])
        if columns is not None:
            self.rewards.check_columns([*columns, made_column(videos), "group"])

    def __call__(self, images: Tensor, asked: Mapping[str, Sequence[Any]]) -> Tensor:
        """(N, n) scores of images (N, n, 3, H, W), or videos (N, n, F, 3, H, W), in [0, 1].

        `asked` holds the N rows of the prompt table.
        """
        num, each = images.shape[:2]
        columns: dict[str, Any] = {name: [v for v in values for _ in range(each)] for name, values in asked.items()}
        columns |= made_columns(images.flatten(0, 1).float().cpu())
        columns["group"] = torch.arange(num).repeat_interleave(each)
        return self.rewards.compute(columns, num * each)[self.name].view(num, each)
