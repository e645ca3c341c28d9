"""Objective: what a policy gradient minimises, pair by pair of recorded evidence.

The learner (policy_gradient.py) records evidence, scores it again under the live weights, and asks its objective for a
loss of each (row, column) pair; means over masks and processes, regularisers, optimiser and averages are the learner's.
It never asks which objective it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import Plan
from rlflow.rl.batch import Batch
from rlflow.rl.likelihoods.base import Likelihood, Score
from rlflow.rl.path_critic import PathCriticLearner
from rlflow.types import Evidence


class Losses(NamedTuple):
    """Of M rows: `pairs` (M, R), or (M, 1) where the likelihood is joint; `logged` numbers have the same shape."""

    pairs: Tensor
    logged: dict[str, Tensor]


class Objective:
    """Base of all objectives: constructed with its settings and the likelihood that records its evidence.

    ValueError at construction for evidence that its formula does not hold for, in `attach` for such a policy.
    """

    sample_with: ClassVar[str] = "live"
    """The weights that sample, 'live' or one of `weight_sets`."""
    weight_sets: ClassVar[tuple[str, ...]] = ()
    """Copies of the weights, made before the first iteration, that it reads or moves."""
    needs_reference: ClassVar[bool] = False
    """True where the evidence has to hold what the reference weights say."""
    whole_rows: ClassVar[bool] = False
    """True where a loss is of all columns of a row at once."""
    fixed: ClassVar[bool] = False
    """True where `loss` makes the same operations in every call, so that a small network's may be recorded."""
    has_critic: ClassVar[bool] = False
    """True where it trains a network of its own, `critic`, which `critic_warmup` lets learn alone."""
    critic: PathCriticLearner | None = None

    def __init__(self, likelihood: Likelihood):
        self.likelihood = likelihood

    @property
    def largest_log_ratio(self) -> float | None:
        """Up to which a log-ratio gains, for doctor; None where nothing bounds it."""
        return None

    def attach(self, policy: FlowPolicy) -> None:
        """Meet the policy that is trained, once, before anything is sampled."""

    def check_steps(self, plan: Plan) -> None:
        """ValueError for a plan of scored steps, as of the first iteration, whose columns it cannot take."""

    def prepare(self, batch: Batch) -> None:
        """Once an iteration, without gradient: what it makes of `batch.advantage`, (N, 1 or R) after it as before."""

    def loss(self, score: Score, evidence: Evidence, advantage: Tensor) -> Losses:
        """Of pairs scored under the live weights, with gradient; `advantage` is (M, 1) or (M, R)."""
        raise NotImplementedError

    def learn(self, batch: Batch, rows: Tensor) -> dict[str, Tensor]:
        """Beside each optimiser step of the policy, on its rows (M,): a step of its own network.

        Logged are this rank's shares of means.
        """
        return {}

    def stop(self, mean: Callable[[str], float]) -> bool:
        """After an epoch: whether to leave out the iteration's other ones; mean(name) is that of a logged number."""
        return False

    def after(self, policy: FlowPolicy, steps: int) -> None:
        """When an iteration is over, after so many optimiser steps in all."""

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs of it, besides weight sets: its critic."""
        return {} if self.critic is None else {"critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
