"""What the update of a learner asks of a card: that of ratios, and that of a reward's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlflow.config.algorithms import AlgorithmConfig, RewardGradientConfig
from rlflow.config.schema import Config
from rlflow.cost.formula import Gradients, Ratios
from rlflow.cost.skeleton import Skeleton
from rlflow.cost.trace import Pass, Trace
from rlflow.flow.steps import Plan
from rlflow.rl.learners.loss import reuses

FLOAT = 4


@dataclass(frozen=True)
class Update:
    """Of one process."""

    cost: Callable[[int, Plan], tuple[int, int]]  # rows of reference and update
    num_minibatches: int
    reference: bool  # the un-tuned weights are needed, and score every pair
    weight_sets: int  # besides those, the live ones and their average
    kept: Callable[[], float]  # bytes of a sample's chain, until the update ends
    reference_kept: float  # and of what the un-tuned weights say of it
    at_once: int  # pairs, or samples, of one pass with a graph
    in_hand: float  # bytes beside such a pass
    graph: Pass
    through_reward: bool  # samples are decoded and judged with a graph
    anchor: bool = False


def update_of(config: Config, bare: Skeleton, traced: Trace, rows: int, plans: Sequence[Plan]) -> Update:
    """Of a learner whose process has `rows` samples an iteration, following `plans`."""
    if isinstance(config.algorithm, AlgorithmConfig):
        return _of_ratios(config.algorithm, bare, traced, rows, plans)
    assert isinstance(config.algorithm, RewardGradientConfig)
    return _of_gradients(config.algorithm, bare, traced, rows)


def _event_bytes(bare: Skeleton) -> int:
    return torch.Size(bare.policy.event_shape).numel() * FLOAT


def _of_ratios(c: AlgorithmConfig, bare: Skeleton, traced: Trace, rows: int, plans: Sequence[Plan]) -> Update:
    assert bare.likelihood is not None
    assert bare.objective is not None
    scored = c.needs_reference or bare.objective.needs_reference
    r = max(1, max(bare.likelihood.num_columns(plan) for plan in plans))
    whole = max(1, c.micro_batch // r) * r if r <= c.micro_batch else c.micro_batch
    reused = c.num_minibatches if reuses(bare.policy, bare.likelihood, bare.objective.sample_with) else 0
    return Update(
        Ratios(bare.policy, bare.likelihood, c.epochs, c.micro_batch, scored, bool(c.anchor), reused).cost,
        num_minibatches=c.num_minibatches,
        reference=scored,
        weight_sets=len(bare.objective.weight_sets),
        kept=lambda: r * (traced.pair_bytes() + _event_bytes(bare) * (reused > 0)),
        reference_kept=r * scored * _event_bytes(bare),
        at_once=min(whole, -(-rows // c.num_minibatches) * r),
        in_hand=0.0,
        graph=traced.scoring,
        through_reward=False,
        anchor=bool(c.anchor),
    )


def _of_gradients(c: RewardGradientConfig, bare: Skeleton, traced: Trace, rows: int) -> Update:
    assert bare.through is not None
    way, steps, at_once = bare.through, bare.policy.num_steps, min(c.micro_batch, rows)
    states = 1 + (steps if c.kl else way.kept(steps))
    return Update(
        Gradients(bare.policy, way, bool(c.kl)).cost,
        num_minibatches=1,
        reference=bool(c.kl) or way.needs_reference,
        weight_sets=0,
        kept=lambda: float(states * _event_bytes(bare)),
        reference_kept=0.0,
        at_once=at_once,
        in_hand=(2 * steps + 3) * at_once * _event_bytes(bare)
        if way.needs_reference
        else 0.0,  # means, adjoints, a loss
        graph=traced.stepping,
        through_reward=True,
    )
