"""What the training loop asks of a learner, whichever it is: `algorithm.update(collector.collect(iteration))`."""

from __future__ import annotations

from typing import Any, Protocol

from rlflow.rl.optim import Optimizer
from rlflow.types import Rollout


class Algorithm(Protocol):
    """PolicyGradient, SAC, RewardGradient, or a learner of your own."""

    @property
    def optimizer(self) -> Optimizer:
        """Of the policy: its counters tell whether the weights can be trusted."""

    @property
    def micro_batch(self) -> int:
        """Most rows of one network pass."""

    @property
    def sample_with(self) -> str:
        """The weights that are to sample, 'live' or another set of the policy."""

    @property
    def keep_path(self) -> int:
        """Last denoising steps of which rollouts are to keep the states; 0 for none."""

    def begin(self) -> None:
        """Once, before the first iteration of a run and its first evaluation; not after a resume."""

    def set_progress(self, progress: float) -> None:
        """Share of the run that is done, in [0, 1], for schedules; before a rollout."""

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learn from one iteration of experience; metrics."""

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs besides the policy and its weight sets."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
