"""Critics by lot (REDQ, RLPD): what a random few say of a target, and the mean of all to the actor."""

from itertools import combinations

import pytest
import torch

from rlflow.flow.noise import generator
from rlflow.rl.off_policy.twin import Twin, TwinSettings
from rlflow.types import Cond

CPU = torch.device("cpu")


def make(**settings) -> Twin:
    torch.manual_seed(0)
    return Twin(6, TwinSettings(width=8, **settings), CPU, torch.float64)


def asked(num: int = 5) -> tuple[Cond, torch.Tensor]:
    torch.manual_seed(1)
    return Cond({"pooled": torch.randn(num, 4).double()}), torch.randn(num, 1, 2).double()


def test_all_of_them_are_the_least_of_all_to_the_bit():
    cond, action = asked()
    every, least = make(num=4, subset=4), make(num=4)
    every.redraw(generator("test"))
    assert torch.equal(every.target_value(cond, action), least.target_value(cond, action))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_subset_is_drawn_as_often_and_its_least_is_the_target(size):
    """So the mean target over draws is the mean over all subsets: of one, the mean of the critics."""
    cond, action = asked(1)
    twin = make(num=5, subset=size)
    q = twin.target(cond["pooled"], action)[:, 0]
    found, drawn = [], []
    for i in range(2000):
        twin.redraw(generator("test", i))
        drawn.append(tuple(sorted(twin.chosen.tolist())))
        found.append(float(twin.target_value(cond, action)))
        assert found[-1] == float(q[twin.chosen].min())
    subsets = list(combinations(range(5), size))
    assert set(drawn) == set(subsets)
    assert max(drawn.count(s) for s in subsets) < 1.5 * 2000 / len(subsets)
    expected = torch.stack([q[list(s)].min() for s in subsets]).mean()
    assert sum(found) / 2000 == pytest.approx(float(expected), abs=4 * float(q.std()) / 2000**0.5)


def test_a_target_asks_nobody_else():
    """Critics that were not drawn may be anything."""
    cond, action = asked()
    twin = make(num=5, subset=2)
    twin.redraw(generator("test"))
    before = twin.target_value(cond, action)
    others = [e for e in range(5) if e not in twin.chosen.tolist()]
    for p in twin.target.parameters():
        p.data[others] = float("nan")
    assert torch.equal(twin.target_value(cond, action), before)
    asked_of = []
    twin.target.register_forward_pre_hook(lambda net, given: asked_of.append(given[2]))
    twin.target_value(cond, action)
    assert torch.equal(asked_of[0], twin.chosen)


def test_the_actor_climbs_the_mean_of_all():
    cond, action = asked()
    twin = make(num=5, subset=2)
    assert torch.equal(twin.value(cond, action), twin.net(cond["pooled"], action).mean(0))


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="critic_subset: 3 of 2 critics: give at most num_critics"):
        TwinSettings(num=2, subset=3)
