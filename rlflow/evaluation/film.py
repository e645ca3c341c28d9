"""Film: what episodes look like, taken while they are evaluated."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import TracebackType

from torch import Tensor

from rlflow.envs.base import VecEnv
from rlflow.report.video import SECONDS, write_video


class Film:
    """Frames of an environment's first `num` rows, each until its first end and at most `SECONDS` long.

    Inside `with`, the environment calls back after every primitive step. Without an environment, or where it cannot
    be seen, a film stays empty: that is said, and no evaluation fails by it. `num` None: `DEFAULT` rows, without a
    word where the environment draws no pictures at all.
    """

    FPS, DEFAULT = 25.0, 2

    def __init__(self, env: VecEnv | None = None, num: int | None = 0):
        self.env = None if env is None else env.unwrapped
        self.asked, num = num is not None, self.DEFAULT if num is None else num
        self.frames: list[list[Tensor]] = [[] for _ in range(0 if env is None else min(num, env.num_envs))]
        self.ended = [False] * len(self.frames)
        seconds = 1.0 if env is None else env.step_seconds
        self.every = max(1, round(1 / (self.FPS * seconds)))
        self.fps = 1 / (self.every * seconds)
        self.steps = 0

    def __enter__(self) -> Film:
        if self.env is not None and self.frames:
            self.env.watch = self.take
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.env is not None:
            self.env.watch = None

    def take(self) -> None:
        """One more primitive step has been made."""
        if self.steps % self.every == 0 and self.env is not None:
            try:
                for row, frames in enumerate(self.frames):
                    if not self.ended[row] and len(frames) < SECONDS * self.fps:
                        frames.append(self.env.render(row))
            except RuntimeError as error:  # NotImplementedError: it never draws
                if self.asked or not isinstance(error, NotImplementedError):
                    warnings.warn(f"no film of the evaluation: {error}", stacklevel=2)
                self.frames, self.env.watch = [], None
        self.steps += 1

    def cut(self, ended: Tensor) -> None:
        """The rows of `ended` (B,) are over."""
        for row in range(len(self.frames)):
            self.ended[row] = self.ended[row] or bool(ended[row])

    def save(self, folder: Path, iteration: int) -> list[Path]:
        """Write film_ITERATION_ROW.mp4 into `folder`, and return what was written."""
        films = {folder / f"film_{iteration:06d}_{row}.mp4": frames for row, frames in enumerate(self.frames) if frames}
        for path, frames in films.items():
            write_video(frames, path, self.fps)
        return list(films)
