"""Recorded functions: the same bits as the function, what is computed once, and what cannot be recorded."""

import numpy as np
import pytest
import torch

from rlflow.assembly.parts import make_parts
from rlflow.config import recipes
from rlflow.flow.kernels import LearnedNoise
from rlflow.flow.policy import FlowPolicy
from rlflow.models.mlp import MLPField
from rlflow.rl.recorded import Recorded


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return FlowPolicy(MLPField(4, (1, 2), 8), LearnedNoise(4, (1, 2), 0.1, 0.4, width=8), num_steps=2)


def record(fn, policy, moving=(), calls=2, like=None):
    """A function after so many calls on tensors (3, 2)."""
    found = Recorded(fn, policy, moving)
    for _ in range(calls):
        found(torch.randn(3, 2) if like is None else like())
    return found


# -- learners -------------------------------------------------------------------------------------

SAC = ["algorithm.batch_size=16", "algorithm.critic_width=8", "algorithm.start=64", "env.num_groups=8"]
REACH = ["env.num_groups=8", "algorithm.num_minibatches=2"]


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("robot_reach_sac", ["policy.field.width=16"]),
        ("robot_reach_sac", ["policy.field={name: gaussian, width: 16}", "policy.num_steps=1"]),
        ("robot_reach_sac", ["policy.field={name: decoder, width: 16, depth: 1, heads: 2}", "algorithm.actor_every=2"]),
        ("robot_reach_sac", ["policy.kernel.hold=0.3", "policy.precision=bfloat16", "algorithm.anchor=1.0"]),
        ("robot_reach_reinflow", []),
        ("robot_reach_reinflow", ["policy.kernel.hold=0.3", "policy.precision=bfloat16"]),
    ],
)
def test_learners_do_what_they_would_without(recipe, overrides):
    """Weights, moments, metrics and counts of rows after three iterations, to the bit."""
    found = []
    for plain in (False, True):
        parts = make_parts(recipes.load(recipe, [*(SAC if recipe.endswith("sac") else REACH), *overrides]))
        learner = parts.algorithm
        recorded = [v for o in (learner, getattr(learner, "critic", None)) if o for v in vars(o).values()]
        recorded = [v for v in recorded if isinstance(v, Recorded)]
        assert recorded
        for one in recorded:
            one.why_not = "plain" if plain else None
        told = []
        for iteration in range(3):
            learner.set_progress(iteration / 3)
            told.append(learner.update(parts.collector.collect(iteration)))
        assert {one.why_not for one in recorded} == {"plain" if plain else None}
        assert plain or all(one.recordings for one in recorded)
        found.append((told, parts.policy.counts, dict(parts.policy.state_dict()), learner.state_dict()))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


# -- what is made once ----------------------------------------------------------------------------


def test_what_is_held_is_computed_once_an_iteration_and_moving_weights_are_read_anew(policy):
    scale, weight = torch.tensor(2.0), torch.nn.Parameter(torch.ones(2, 2))
    found = record(lambda x: (x @ weight.t()) * scale.exp() + weight.sum(), policy, [weight])
    (recording,) = found.recordings.values()
    code = recording.main.__self__.code
    assert "exp" not in code
    assert ".t(" not in code
    x = torch.randn(3, 2)
    with torch.no_grad():
        weight.mul_(3.0)
    torch.testing.assert_close(found(x), 3 * x.sum(1, keepdim=True).expand(3, 2) * scale.exp() + 12)
    scale.fill_(0.0)
    found.renew()
    torch.testing.assert_close(found(x), 3 * x.sum(1, keepdim=True).expand(3, 2) + 12)


def test_writing_in_place_changes_no_argument_and_no_result(policy):
    """Of chains of elementwise operations all but the first may write where they read."""

    def fn(x):
        y = (x * 2 + 1).tanh()
        return [y, (y * 3).relu().exp(), x.flatten()]

    found, x = record(fn, policy), torch.randn(3, 2)
    kept = x.clone()
    (recording,) = found.recordings.values()
    assert "relu_" in recording.main.__self__.code
    assert found.why_not is None
    torch.testing.assert_close(found(x), fn(kept), rtol=0, atol=0)
    assert torch.equal(x, kept)


def test_a_function_may_write_to_what_it_made(policy):
    def fn(x):
        room = torch.zeros(3, 2)
        room[1] += x[0]
        return room

    found, x = record(fn, policy, calls=3), torch.randn(3, 2)
    assert found.why_not is None
    assert torch.equal(found(x), fn(x))


def test_each_shape_has_a_recording(policy):
    found = record(lambda x: x * 2, policy)
    assert torch.equal(found(torch.ones(5, 2)), torch.full((5, 2), 2.0))
    assert len(found.recordings) == 2


# -- what cannot be recorded ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x: x * 2 if x.sum() > 0 else x * 3, "a value that differs from call to call"),
        (lambda x: x[x > 0].sum(), "a value that differs from call to call"),
        (lambda x: x + torch.randn(3, 2), "random numbers"),
        (lambda x: x.add_(1), "changes a tensor that it was given"),
    ],
)
def test_what_is_no_fixed_list_runs_as_it_is(policy, fn, reason):
    found = record(fn, policy, calls=1)
    assert reason in found.why_not
    for x in (torch.ones(3, 2), -torch.ones(3, 2)):
        torch.manual_seed(0)
        expected = fn(x.clone())
        torch.manual_seed(0)
        torch.testing.assert_close(found(x.clone()), expected)


def test_a_detour_around_tensors_is_noticed_at_the_second_call(policy):
    fn = lambda x: x * torch.from_numpy(np.exp(x.numpy()))  # noqa: E731
    found = record(fn, policy, calls=2)
    assert "second call" in found.why_not
    x = torch.randn(3, 2)
    assert torch.equal(found(x), fn(x))


def test_a_decision_by_what_is_held_is_taken_again(policy):
    switch = torch.tensor(1.0)
    found, x = record(lambda x: x * 2 if switch > 0 else x * 3, policy), torch.ones(3, 2)
    assert torch.equal(found(x), 2 * x)
    switch.fill_(-1.0)
    found.renew()
    assert torch.equal(found(x), 3 * x)


def test_another_number_of_an_owner_is_recorded_anew(policy):
    policy.kernel.std_min = 0.5
    found, x = record(lambda x: x * policy.kernel.std_min, policy), torch.ones(3, 2)
    policy.kernel.std_min = 0.25
    found.renew()
    assert torch.equal(found(x), 0.25 * x)
