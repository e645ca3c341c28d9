"""Callback: code of one's own at the turning points of a run.

    class Watch(Callback):
        def on_evaluation(self, trainer, metrics): ...

Every process calls its own; what one of them changes in the policy, the others have to change too. `trainer.stop()`
ends the run after the iteration under way, with a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rlflow.types import Rollout

if TYPE_CHECKING:
    from rlflow.train.trainer import Trainer

AfterIteration = Callable[["Trainer", int, dict[str, float]], None]
"""(trainer, iteration, metrics), called after every iteration: the short form of a Callback."""


class Callback:
    """Override what you need; none of the methods does anything by itself."""

    def on_start(self, trainer: Trainer) -> None:
        """The run folder is there; nothing has been evaluated or trained by this `fit` yet."""

    def on_rollout(self, trainer: Trainer, rollout: Rollout) -> None:
        """An iteration's samples have been scored, and are what the update will see."""

    def on_iteration(self, trainer: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        """`iteration` iterations are done, and logged."""

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Held-out metrics (eval/heldout/...) of `trainer.iteration`; its pictures or films are in samples/."""

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """A checkpoint is complete in `folder`."""

    def on_end(self, trainer: Trainer) -> None:
        """The report and model/ are written; `trainer.interrupted` says whether the budget was spent. Not on errors."""


class Each(Callback):
    """A plain function, called after every iteration."""

    def __init__(self, function: AfterIteration):
        self.function = function

    def on_iteration(self, trainer: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        """Call it."""
        self.function(trainer, iteration, metrics)
