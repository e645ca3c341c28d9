"""Ranks inside a group: what order alone decides, whatever the scale, with rows that have no score."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlflow.rewards.base import Reward, RewardSet
from rlflow.rewards.group_rank import GroupRank, ranks
from rlflow.rewards.scores import SomeRows

numbers = st.lists(st.one_of(st.integers(-5, 5).map(float), st.just(float("nan"))), min_size=1, max_size=12)


@given(numbers, st.integers(1, 4))
def test_ranks_depend_on_order_inside_the_group_alone(values: list[float], size: int) -> None:
    """Any increasing map leaves them; they sum to 0 in a group; best and worst of a group without ties have 1 and -1."""
    scores, group = torch.tensor(values), torch.arange(len(values)) // size + 2**40
    found = ranks(scores, group)
    assert torch.equal(found.nan_to_num(9), ranks((scores * 0.3).exp() * 100 - 7, group).nan_to_num(9))
    assert torch.equal(-found.nan_to_num(9), ranks(-scores, group).nan_to_num(-9))
    for g in group.unique():
        mine, theirs = found[group == g], scores[group == g]
        scored = ~theirs.isnan()
        if scored.sum() < 2:
            assert mine.isnan().all()
            continue
        assert torch.equal(mine.isnan(), ~scored)
        assert float(mine.nansum()) == pytest.approx(0, abs=1e-6)
        if len(theirs[scored].unique()) == scored.sum():
            assert (float(mine[scored].min()), float(mine[scored].max())) == (-1, 1)


def test_another_group_changes_nothing() -> None:
    scores, group = torch.tensor([1.0, 2.0, 9.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 1, 1])
    assert ranks(scores, group).tolist() == [-1, 0, 1, 0, 0]
    scores[3] = 100.0
    assert ranks(scores, group).tolist() == [-1, 0, 1, 1, -1]
    scores[3] = torch.nan
    assert ranks(scores, group).isnan().tolist() == [False, False, False, True, True]


def test_it_wraps_a_reward_with_its_settings() -> None:
    reward = GroupRank("jpeg_compressibility", {"quality": 50})
    assert reward.columns == ("images",)
    images = torch.rand(4, 3, 16, 16)
    images[0] = images[2] = 0.5  # smooth is small
    made = RewardSet([Reward("r", reward)])
    assert made.columns == ("group", "images")
    scores = made.compute({"images": images, "group": torch.tensor([0, 0, 1, 1])}, 4)["r"]
    assert scores.tolist() == [1, -1, 1, -1]
    with pytest.raises(ValueError, match="unknown reward 'jpeg'"):
        GroupRank("jpeg")


def test_rows_that_the_wrapped_reward_could_not_score_stay_counted() -> None:
    def some(prompt: list[str]) -> Tensor:
        raise SomeRows([1.0, None, 3.0], "one is missing")

    reward = GroupRank("redness")
    reward.of, reward.columns = some, ("prompt",)
    with pytest.raises(SomeRows, match="one is missing") as error:
        reward(prompt=["a", "b", "c"], group=torch.zeros(3))
    assert torch.as_tensor(error.value.scores).nan_to_num(9).tolist() == [-1, 9, 1]
