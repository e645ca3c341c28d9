"""Best-of-N: one of the N, the better the more there are, and the plain sampler where N is 1."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rlflow.flow.kernels import FlowSDE
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.select import APART, BestOf, Select
from rlflow.flow.squash import Tanh
from rlflow.flow.steps import All
from rlflow.models.mlp import MLPField

KEY, ROWS = Key(3, "deploy"), torch.arange(5, 10)
OBS = torch.linspace(-1, 1, 20).reshape(5, 4)


@pytest.fixture
def policy() -> FlowPolicy:
    torch.manual_seed(0)
    return FlowPolicy(MLPField(4, (3, 2), width=16), FlowSDE(0.7), num_steps=3, squash=Tanh())


class Seen:
    """A scorer that remembers what it was shown: the sum of each sample's numbers, off by what was asked."""

    def __call__(self, made: Tensor, asked: Tensor) -> Tensor:
        self.made, self.asked = made, asked
        self.scores = made.flatten(2).sum(2) * asked.sum(1, keepdim=True).sign()
        return self.scores


@torch.no_grad()
def chosen(policy: FlowPolicy, select: Select, noisy: bool = False, rows: Tensor = ROWS) -> Tensor:
    plan = All()(0, policy.plan().t, rows) if noisy else policy.plan()
    return select(policy, policy.encode(OBS), OBS, plan, KEY, rows)


@torch.no_grad()
@pytest.mark.parametrize("noisy", [False, True])
def test_the_best_of_one_is_the_plain_sampler_bit_for_bit(policy: FlowPolicy, noisy: bool) -> None:
    plan = All()(0, policy.plan().t, ROWS) if noisy else policy.plan()
    plain = policy.squash(policy.sample(policy.encode(OBS), plan, key=KEY, row_ids=ROWS).final)
    assert torch.equal(chosen(policy, Select(), noisy), plain)
    assert torch.equal(chosen(policy, BestOf(1, Seen()), noisy), plain)


def test_the_chosen_one_is_the_best_of_those_scored(policy: FlowPolicy) -> None:
    seen = Seen()
    best = chosen(policy, BestOf(7, seen))
    assert seen.made.shape == (5, 7, 3, 2)
    assert seen.asked is OBS, "raw observations of the rows, not of the samples"
    for row, made, scores in zip(best, seen.made, seen.scores, strict=True):
        assert torch.equal(row, made[scores.argmax()])


def test_more_samples_never_score_less(policy: FlowPolicy) -> None:
    """Those of fewer are among those of more, the plain one first."""
    few, many = Seen(), Seen()
    scores = []
    for num in (1, 2, 4, 8):
        few = Seen()
        chosen(policy, BestOf(num, few))
        scores.append(few.scores.amax(1))
        chosen(policy, BestOf(8, many))
        torch.testing.assert_close(few.made, many.made[:, :num])
    assert all(bool((b >= a).all()) for a, b in pairwise(scores))
    assert float((scores[-1] - scores[0]).mean()) > 0.1


def test_no_two_samples_share_a_number_of_noise() -> None:
    """Of one row, nor of any two rows, whichever way the rows are split; also where rows are drawn in blocks."""

    class Starts(FlowPolicy):
        def sample(self, cond, plan=None, **more):  # type: ignore[no-untyped-def]
            self.ids = more["row_ids"]
            return super().sample(cond, plan, keep_path=True, **more)

    policy = Starts(MLPField(4, (3, 2), width=16), FlowSDE(0.7), num_steps=1)
    made = []
    with torch.no_grad():
        for rows in (ROWS[:2], ROWS[2:]):
            BestOf(6, lambda made, asked: made.flatten(2).sum(2))(
                policy, policy.encode(OBS[rows - 5]), OBS[rows - 5], policy.plan(), KEY, rows
            )
            made.append(
                policy.sample(policy.encode(OBS[rows - 5]), policy.plan(), key=KEY, row_ids=policy.ids, copies=6)
            )
    starts = torch.cat([chain.path[:, 0] for chain in made]).flatten()
    assert len(starts.unique()) == 5 * 6 * 6
    assert int(policy.ids.max()) == 9 + 5 * APART


def test_network_rows_are_counted_for_every_sample(policy: FlowPolicy) -> None:
    chosen(policy, Select())
    plain, policy.network_rows, policy.encoder_rows = policy.network_rows, 0, 0
    chosen(policy, BestOf(6, Seen()))
    assert policy.network_rows == 6 * plain
    assert policy.encoder_rows == 5, "what is asked is read once"


def test_what_has_no_score_is_taken_only_where_nothing_has_one(policy: FlowPolicy) -> None:
    nan, inf = torch.nan, torch.inf
    table = torch.tensor([[nan, -3.0, nan], [nan, nan, nan], [1.0, 1.0, nan], [nan, -inf, 0.0], [2.0, inf, nan]])
    plain = Seen()
    chosen(policy, BestOf(3, plain))
    best = chosen(policy, BestOf(3, lambda made, asked: table))
    assert torch.equal(best, plain.made[torch.arange(5), torch.tensor([1, 0, 0, 2, 1])])


def test_a_scorer_of_another_shape_and_a_given_start_are_refused(policy: FlowPolicy) -> None:
    with pytest.raises(ValueError, match=r"the scorer gave \(15,\) scores for \(5, 3\) samples"):
        chosen(policy, BestOf(3, lambda made, asked: made.flatten(0, 1).flatten(1).sum(1)))
    with pytest.raises(ValueError, match="leave x_0 out"):
        BestOf(2, Seen())(policy, policy.encode(OBS), OBS, policy.plan(), KEY, ROWS, torch.zeros(5, 3, 2))


@pytest.mark.parametrize(
    "select", [Select(), BestOf(2, lambda made, asked: made.flatten(2).sum(2))], ids=["one", "best"]
)
def test_actions_in_units_of_the_networks_own_are_decoded_once_by_the_environment(policy: FlowPolicy, select) -> None:
    plain = chosen(policy, select)
    policy.field.decode = lambda x: 100 + 3 * x
    pictures = chosen(policy, select)
    policy.field.decodes_actions = True
    assert torch.equal(chosen(policy, select), plain)
    torch.testing.assert_close(pictures, 100 + 3 * plain)
