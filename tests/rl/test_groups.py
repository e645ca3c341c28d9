"""Groups: seeds, rows and minibatches are pure functions of (seed, iteration), whatever the number of processes."""

import pytest
import torch

from rlflow.rl.groups import Groups

WORLDS = [1, 2, 3, 6]


def shares(num: int, size: int, world: int) -> list[Groups]:
    return [Groups(num, size, rank, world) for rank in range(world)]


@pytest.mark.parametrize("world", WORLDS)
class TestShares:
    def test_concatenated_over_ranks_are_the_one_process(self, world):
        whole, parts = Groups(6, 4), shares(6, 4, world)
        for name in ("row_ids", "group_ids"):
            assert torch.equal(torch.cat([getattr(p, name)() for p in parts]), getattr(whole, name)())
        for iteration in (0, 5):
            assert torch.equal(torch.cat([p.seeds(iteration) for p in parts]), whole.seeds(iteration))

    def test_a_rank_has_whole_groups(self, world):
        for part in shares(6, 4, world):
            assert part.group_ids().unique(return_counts=True)[1].tolist() == [4] * (6 // world)

    @pytest.mark.parametrize("num", [1, 2])
    @pytest.mark.parametrize("horizon", [1, 3])
    def test_minibatches_together_are_those_of_one_process(self, world, num, horizon):
        groups, per_rank = 12, 12 // world
        uniform = torch.rand(horizon, groups)

        def of(part: Groups) -> list[set[tuple[int, int]]]:
            """(outer step, global row) of each minibatch."""
            rows = part.minibatches(horizon, num, uniform)
            first = part.rank * part.num_rows
            return [{(int(r) // part.num_rows, int(r) % part.num_rows + first) for r in m} for m in rows]

        whole = of(Groups(groups, 2))
        parts = [of(p) for p in shares(groups, 2, world)]
        for i in range(num):
            assert set().union(*(p[i] for p in parts)) == whole[i]
            assert {len(p[i]) for p in parts} == {horizon * per_rank * 2 // num}


class TestMinibatches:
    UNIFORM = torch.rand(3, 12, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("num", [1, 2, 3, 4, 12])
    def test_partition_the_rows_in_whole_groups_of_one_step(self, num):
        groups = Groups(12, 5)
        parts = groups.minibatches(3, num, self.UNIFORM)
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(3 * 60))
        for part in parts:
            assert len(part) == 3 * 60 // num
            assert part.div(5, rounding_mode="floor").unique(return_counts=True)[1].tolist() == [5] * (len(part) // 5)

    def test_are_drawn_by_the_numbers_given(self):
        groups = Groups(12, 5)
        one, two = (groups.minibatches(3, 2, u) for u in (self.UNIFORM, self.UNIFORM.flip(1)))
        assert not torch.equal(one[0], two[0])
        assert torch.equal(one[0], groups.minibatches(3, 2, self.UNIFORM)[0])

    def test_every_step_is_dealt_apart(self):
        groups = Groups(12, 1)
        part = groups.minibatches(3, 2, self.UNIFORM)[0].reshape(3, -1)
        assert not torch.equal(part[0], part[1] - 12)

    def test_must_divide_the_groups_of_a_process(self):
        with pytest.raises(ValueError, match="num_minibatches=2 must divide the 3 groups"):
            Groups(6, 2, 0, 2).minibatches(1, 2, torch.rand(1, 6))


class TestSeeds:
    def test_are_serial_numbers_that_no_two_iterations_share(self):
        groups = Groups(6, 4)
        seen = torch.cat([groups.seeds(i)[::4] for i in range(10)])
        assert torch.equal(seen, torch.arange(60))

    def test_rows_of_a_group_share_theirs(self):
        assert Groups(3, 4).seeds(2).tolist() == [6] * 4 + [7] * 4 + [8] * 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 4), "at least one group"),
        ((4, 0), "at least one group"),
        ((4, 4, 0, 3), "set num_groups to a multiple of 3"),
    ],
)
def test_impossible_shares_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        Groups(*args)
