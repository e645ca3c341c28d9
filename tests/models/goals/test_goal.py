"""Goals: the vocabulary is of data and seed, targets peak at the nearest, a hidden goal is none, the choice is the rule."""

import math

import pytest
import torch
from torch import Tensor

from rlflow.flow.matching import cfm_loss
from rlflow.models.goals.goal import FREE, NEAR, GoalField, kmeans, nearness, score_loss
from rlflow.models.io import load_field, save_field
from rlflow.pretrain.goals import l1_loss
from rlflow.types import Cond


def made() -> GoalField:
    torch.manual_seed(0)
    return GoalField(5, (4, 2), vocabulary=7, width=16, depth=1)


class TestVocabulary:
    def test_is_a_function_of_data_and_seed(self) -> None:
        points = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        assert torch.equal(kmeans(points, 8), kmeans(points, 8))
        assert not torch.equal(kmeans(points, 8, seed=1), kmeans(points, 8))

    def test_each_centre_is_the_mean_of_its_own(self) -> None:
        """The fixed point of Lloyd's rounds, and the clusters that are there."""
        blobs = torch.tensor([[0.0, 0], [9, 0], [0, 9]])
        points = (blobs[:, None] + 0.1 * torch.randn(3, 40, 2)).flatten(0, 1)
        centres = kmeans(points, 3)
        owner = torch.cdist(points, centres).argmin(1)
        for i, centre in enumerate(centres):
            torch.testing.assert_close(points[owner == i].mean(0), centre)
        wide = kmeans(torch.randn(500, 2), 20)
        assert len(wide.unique(dim=0)) == 20

    def test_more_centres_than_points_are_refused(self) -> None:
        with pytest.raises(ValueError, match="9 clusters of 4 distinct points"):
            kmeans(torch.randn(4, 2).repeat(5, 1), 9)


class TestScores:
    def test_targets_sum_to_one_and_peak_at_the_nearest_centre(self) -> None:
        goals, true = 3 * torch.randn(9, 2), 3 * torch.randn(50, 2)
        targets = nearness(goals, true)
        torch.testing.assert_close(targets.sum(1), torch.ones(50))
        assert torch.equal(targets.argmax(1), torch.cdist(true, goals).argmin(1))
        # metres at temperature 1: twice as likely for ln 2 square metres less
        goals = torch.tensor([[0.0, 0.0], [math.sqrt(math.log(2)), 0.0]])
        torch.testing.assert_close(nearness(goals, torch.zeros(1, 2)), torch.tensor([[2 / 3, 1 / 3]]))

    def test_the_loss_is_nothing_at_its_targets_only(self) -> None:
        targets, clear = torch.softmax(torch.randn(6, 4), -1), torch.rand(6, 4) > 0.5
        sure = torch.where(clear, 60.0, -60.0)
        assert float(score_loss(targets.log() + 3, sure, targets, clear)) == pytest.approx(0, abs=1e-6)
        assert float(score_loss(torch.randn(6, 4), sure, targets, clear)) > 1e-2
        assert float(score_loss(targets.log(), -sure, targets, clear)) > 10

    def test_the_goal_taken_is_that_of_the_rule(self) -> None:
        field, scene = made(), torch.randn(30, 5)
        near, clear = (v.detach() for v in field.score(scene))
        for row in range(30):
            value = [
                NEAR * float(near[row].log_softmax(0)[g]) + FREE * float(torch.sigmoid(clear[row, g]).log())
                for g in range(7)
            ]
            assert torch.equal(field.choose(scene)[row], field.goals[max(range(7), key=value.__getitem__)])


class TestCondition:
    def test_a_goal_that_is_told_is_taken_and_else_the_chosen_one(self) -> None:
        field, scene = made(), torch.randn(6, 5)
        chosen = field.choose(scene)
        assert torch.equal(field.encode(scene)["pooled"], field.encode({"obs": scene, "goal": chosen})["pooled"])
        other = field.encode({"obs": scene, "goal": chosen + 1})["pooled"]
        assert torch.equal(other[:, :5], field.encode(scene)["pooled"][:, :5])
        assert not torch.allclose(other[:, 5:7], field.encode(scene)["pooled"][:, 5:7])

    def test_null_hides_the_goal_alone(self) -> None:
        field, scene = made(), torch.randn(6, 5)
        null = [field.null(field.encode({"obs": scene, "goal": torch.full((6, 2), g)}))["pooled"] for g in (0.0, 9.0)]
        assert torch.equal(*null)
        assert torch.equal(null[0][:, :5], field.encode(scene)["pooled"][:, :5])
        assert not null[0][:, 5:].any()

    def test_the_vocabulary_is_saved(self, tmp_path) -> None:
        field, scene = made(), torch.randn(6, 5)
        save_field(field, tmp_path / "field")
        again = load_field(str(tmp_path / "field"))
        assert isinstance(again, GoalField)
        assert torch.equal(again.choose(scene), field.choose(scene))


class Constant(GoalField):
    """One velocity everywhere."""

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        return self.value.expand_as(x)


def test_squares_fit_the_mean_and_absolute_errors_the_median() -> None:
    """Of three velocities 0, 0, 3 the mean 1 carries noise to data on average; L1 stays at 0."""
    field = Constant(5, (1, 1), vocabulary=3, width=8, depth=1)
    x_0, x_1 = torch.zeros(3, 1, 1), torch.tensor([0.0, 0.0, 3.0]).view(3, 1, 1)
    cond, t = Cond({"pooled": torch.zeros(3, 8)}), torch.full((3,), 0.5)
    tried = torch.linspace(-1, 4, 101)

    def best(loss) -> float:
        found = []
        for value in tried:
            field.value = value
            found.append(float(loss(field, x_1, cond, x_0, t).mean()))
        return float(tried[torch.tensor(found).argmin()])

    assert best(cfm_loss) == pytest.approx(1, abs=0.03)
    assert best(l1_loss) == pytest.approx(0, abs=0.03)
