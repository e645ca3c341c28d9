"""Videos before rewards: `frames` (N, F, 3, H, W) for those that read them, for one of images a mean over some of them.

    r(video) = mean over i in I of r(frame i)        I: `reward.frames`, the middles of so many equal parts, or a list

A row without a score in one of its frames has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlflow.rewards.base import Elsewhere, Reward
from rlflow.rewards.component import column_names, is_differentiable, reads
from rlflow.rewards.scores import SomeRows, scored

OF_VIDEOS = {"images": "frames", "base_images": "base_frames"}
"""Columns of pictures, and of videos in their place."""


def made_column(videos: bool) -> str:
    """Under which name rewards read what a policy made."""
    return "frames" if videos else "images"


def made_columns(made: Tensor, base: Tensor | None = None) -> dict[str, Any]:
    """What a policy made, (N, 3, H, W) or (N, F, 3, H, W), by that name; the un-tuned policy's `base` beside it."""
    name = made_column(made.ndim == 5)
    return {name: made} if base is None else {name: made, f"base_{name}": base}


def frame_ids(which: int | Sequence[int], num_frames: int) -> list[int]:
    """The frames that `which` says, of so many; ValueError for one that there is not."""
    if which == [] or (isinstance(which, int) and which < 1):
        raise ValueError(f"{which} names no frame: give a number of them, or a list")
    if isinstance(which, int):
        return [int((i + 0.5) / which * num_frames) for i in range(min(which, num_frames))]
    if wrong := [i for i in which if not -num_frames <= i < num_frames]:
        raise ValueError(f"{wrong[0]} is no frame of {num_frames}")
    return [i % num_frames for i in which]


class OverFrames:
    """A reward of images as one of videos."""

    def __init__(self, of: Callable[..., Any], ids: Sequence[int]):
        self.of, self.ids, self.columns = of, ids, column_names(of)
        self.__signature__ = reads([OF_VIDEOS.get(name, name) for name in self.columns])
        self.differentiable = is_differentiable(of)

    def __call__(self, **columns: Any) -> Tensor:
        """(N,) means; SomeRows where the reward could not score all rows of a frame."""
        frames = columns["frames"]
        if self.differentiable and frames.requires_grad and torch.is_grad_enabled():
            return torch.stack([self.of(**self._given(columns, i)) for i in self.ids]).mean(0)
        found = [scored(lambda i=i: self.of(**self._given(columns, i)), len(frames)) for i in self.ids]  # type: ignore[misc]
        mean = torch.stack([scores for scores, _ in found]).mean(0)
        if reasons := [reason for _, reason in found if reason is not None]:
            raise SomeRows(mean, reasons[0])
        return mean

    def _given(self, columns: dict[str, Any], i: int) -> dict[str, Any]:
        return {n: columns[OF_VIDEOS[n]][:, i] if n in OF_VIDEOS else columns[n] for n in self.columns}


class OverFramesElsewhere(OverFrames, Elsewhere):
    """The same of a reward that waits for another machine."""


def of_videos(reward: Reward, which: int | Sequence[int], num_frames: int | None) -> Reward:
    """The reward as it is where it reads no images, or there are no frames; else over those of `which`."""
    if num_frames is None or not OF_VIDEOS.keys() & set(reward.columns):
        return reward
    kind = OverFramesElsewhere if isinstance(reward.fn, Elsewhere) else OverFrames
    return Reward(reward.name, kind(reward.fn, frame_ids(which, num_frames)), reward.weight, reward.timeout_s)
