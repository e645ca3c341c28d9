"""The unconditional half of guidance that is a constant: computed while sampling, it is not computed again to score."""

from typing import Any

import pytest
import torch

from rlflow.assembly.parts import make_parts
from rlflow.config import recipes
from rlflow.cost.formula import iteration_cost
from rlflow.flow.guidance import CFG, CFGNorm, CFGZero
from rlflow.models.mlp import MLPField
from rlflow.rl.learners.regularizers import KL

SPLIT = {"epochs": 2, "num_minibatches": 2, "micro_batch": 3}


def updated(
    make: Any, wrapper: type[CFG], reuses: bool, **more: Any
) -> tuple[Any, list[torch.Tensor], dict[str, float]]:
    parts = make("reach", field=wrapper(MLPField(4, (2, 2), width=12), 2.0, detach=True), kl=KL(0.1), **SPLIT, **more)
    assert parts.algorithm.reuses
    parts.algorithm.reuses = reuses
    metrics = [parts.iterate(i) for i in range(2)][-1]
    return parts, [p.detach().clone() for p in parts.policy.parameters()], metrics


@pytest.mark.parametrize("wrapper", [CFG, CFGNorm, CFGZero])
def test_the_update_is_the_same_to_the_bit_with_fewer_network_rows(make: Any, wrapper: type[CFG]) -> None:
    """Of the first minibatch only: the second is scored by weights that have moved, and so has their constant."""
    (fewer, mine, told), (all_of_it, theirs, expected) = (updated(make, wrapper, reuses) for reuses in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert told == expected
    assert told["policy/first_log_ratio_max"] == 0
    first = fewer.groups.num_rows * fewer.env.horizon // 2 * 4
    assert all_of_it.policy.network_rows - fewer.policy.network_rows == 2 * first


def test_a_step_of_other_weights_would_show(make: Any) -> None:
    """The conditional half is computed anew: weights that moved since the samples give ratios other than 1."""
    parts = make("reach", field=CFG(MLPField(4, (2, 2), width=12), 2.0, detach=True))
    rollout = parts.collect()
    with torch.no_grad():
        for p in parts.policy.parameters():
            p += 0.01
    assert parts.algorithm.update(rollout)["policy/first_log_ratio_max"] > 0


def test_where_both_halves_have_a_gradient_nothing_is_kept(make: Any) -> None:
    parts = make("reach", field=CFG(MLPField(4, (2, 2), width=12), 2.0))
    assert not parts.algorithm.reuses
    assert parts.collect().constant is None


def test_the_cost_counts_it(scenes_field: str) -> None:
    """Rows of the closed form, which doctor compares, are those that ran."""
    small = ["env.num_groups=4", "env.group_size=4", "policy.num_steps=6", "reward.weights={brightness: 1}"]
    small += ["algorithm.num_minibatches=2", "algorithm.epochs=2", "algorithm.micro_batch=8", "algorithm.kl.beta=0.1"]
    guided = "policy.guidance={name: cfg, scale: 2, detach: true}"
    parts = make_parts(recipes.load("t2i_flow_grpo", [f"policy.field={scenes_field}", guided, *small]))
    before, expected = parts.policy.network_cost, iteration_cost(parts).total
    metrics = parts.algorithm.update(parts.collector.collect(0))
    assert parts.policy.network_cost - before == expected
    assert metrics["policy/first_log_ratio_max"] == 0
