"""Groups: seeds, rows and minibatches are pure functions of (seed, iteration), whatever the number of processes."""

import pytest
import torch

from rlflow.envs.seeds import TRAINING
from rlflow.rl.groups import Groups

WORLDS = [1, 2, 3, 6]


def shares(num: int, size: int, world: int, first: int = 0) -> list[Groups]:
    return [Groups(num, size, rank, world, first) for rank in range(world)]


@pytest.mark.parametrize("world", WORLDS)
class TestShares:
    def test_concatenated_over_ranks_are_the_one_process(self, world):
        whole, parts = Groups(6, 4, first=17), shares(6, 4, world, 17)
        for name in ("row_ids", "group_ids"):
            assert torch.equal(torch.cat([getattr(p, name)() for p in parts]), getattr(whole, name)())
        for iteration in (0, 5):
            assert torch.equal(torch.cat([p.seeds(iteration) for p in parts]), whole.seeds(iteration))

    def test_a_rank_has_whole_groups(self, world):
        for part in shares(6, 4, world):
            assert part.group_ids().unique(return_counts=True)[1].tolist() == [4] * (6 // world)

    @pytest.mark.parametrize("size", [1, 2])
    @pytest.mark.parametrize(("horizon", "num"), [(1, 1), (1, 2), (3, 2), (3, 5), (10, 7), (10, 10)])
    def test_minibatches_together_are_those_of_one_process(self, world, horizon, num, size):
        if (num, horizon, world) == (5, 3, 6):
            num = 3  # five minibatches of six units could leave a process without rows, which is refused
        groups = 12
        uniform = torch.rand(horizon * groups)

        def of(part: Groups) -> list[set[tuple[int, int]]]:
            """(outer step, global row) of each minibatch."""
            rows = part.minibatches(horizon, num, uniform)
            first = part.rank * part.num_rows
            return [{(int(r) // part.num_rows, int(r) % part.num_rows + first) for r in m} for m in rows]

        whole = of(Groups(groups, size))
        parts = [of(p) for p in shares(groups, size, world)]
        for i in range(num):
            assert set().union(*(p[i] for p in parts)) == whole[i]
            assert all(p[i] for p in parts)
            shares_of = [len(p[i]) / size for p in parts]
            assert max(abs(n - horizon * groups / world / num) for n in shares_of) < 2


class TestMinibatches:
    UNIFORM = torch.rand(36, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("num", [1, 2, 5, 7, 12, 36])
    def test_partition_the_rows_in_whole_groups_of_one_step_and_nearly_equal_sizes(self, num):
        parts = Groups(12, 5).minibatches(3, num, self.UNIFORM)
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(3 * 60))
        assert {len(part) // 5 for part in parts} <= {36 // num, -(-36 // num)}
        for part in parts:
            assert part.div(5, rounding_mode="floor").unique(return_counts=True)[1].tolist() == [5] * (len(part) // 5)

    def test_are_drawn_by_the_numbers_given(self):
        groups = Groups(12, 5)
        one, two = (groups.minibatches(3, 2, u) for u in (self.UNIFORM, self.UNIFORM.flip(0)))
        assert not torch.equal(one[0], two[0])
        assert torch.equal(one[0], groups.minibatches(3, 2, self.UNIFORM)[0])

    def test_any_unit_may_meet_any_minibatch(self):
        """Over many draws each of four rows is in each of three minibatches a third of the time."""
        count, g = torch.zeros(3, 4), torch.Generator().manual_seed(0)
        for _ in range(3000):
            for i, rows in enumerate(Groups(2, 1).minibatches(2, 3, torch.rand(4, generator=g))):
                count[i, rows] += 1
        assert float((count / 3000 - 1 / 3).abs().max()) < 0.04

    def test_leave_no_process_without_rows(self):
        with pytest.raises(ValueError, match="num_minibatches=4 leaves a process without rows: it has 3 .* at most 2"):
            Groups(6, 2, 0, 2).minibatches(1, 4, torch.rand(6))
        with pytest.raises(ValueError, match="num_minibatches=7 .* use at most 6"):
            Groups(6, 2).minibatches(1, 7, torch.rand(6))
        for rank in range(2):
            assert all(len(m) for m in Groups(6, 2, rank, 2).minibatches(1, 2, torch.rand(6)))


class TestSeeds:
    def test_are_serial_numbers_that_no_two_iterations_share(self):
        groups = Groups(6, 4)
        seen = torch.cat([groups.seeds(i)[::4] for i in range(10)])
        assert torch.equal(seen, torch.arange(60))

    def test_rows_of_a_group_share_theirs(self):
        assert Groups(3, 4).seeds(2).tolist() == [6] * 4 + [7] * 4 + [8] * 4

    def test_a_run_counts_on_from_its_first_and_never_into_the_seeds_of_evaluation(self):
        first = TRAINING - 4
        seen = torch.cat([Groups(6, 4, first=first).seeds(i)[::4] for i in range(3)])
        assert seen.tolist() == [*range(first, TRAINING), *range(14)]


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
