"""GoalFlow's choice among candidates, its clone of manoeuvres, and the command."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlflow.config import recipes
from rlflow.envs.demos.demonstrators import make_demos
from rlflow.envs.simulators.drive import ToyDrive, trajectory
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.select import BestOf, Select
from rlflow.models.goals.goal import GoalField
from rlflow.models.mlp import MLPField
from rlflow.pretrain.goals import GOALS, NearestGoal, fit_scores
from rlflow.pretrain.worlds import main

CLONING = GOALS["robot_goal_drive"]


def policy(num_steps: int = 2) -> FlowPolicy:
    torch.manual_seed(0)
    return FlowPolicy(GoalField(21, (8, 2), vocabulary=8, width=16, depth=1), FlowSDE(), num_steps=num_steps)


@torch.no_grad()
def test_the_best_of_many_ends_nearest_to_the_goal_and_nearer_the_more_there_are() -> None:
    made, scenes = policy(), ToyDrive(20).reset(torch.arange(20))
    scorer, obs = NearestGoal(made.field), {"obs": scenes, "goal": torch.tensor([25.0, 0.0]).expand(20, 2)}
    given = made.encode(obs), obs, made.plan(), Key(0, "x"), torch.arange(20)
    errors = []
    for num in (1, 4, 16):
        action = BestOf(num, scorer)(made, *given)
        errors.append((trajectory(scenes, action.unsqueeze(1))[:, 0, -1] - obs["goal"]).norm(dim=-1))
        torch.testing.assert_close(-scorer(action.unsqueeze(1), obs)[:, 0], errors[-1])
    assert torch.equal(BestOf(1, scorer)(made, *given), Select()(made, *given))
    assert (errors[2] <= errors[1]).all()
    assert (errors[1] <= errors[0]).all()
    assert float(errors[2].mean()) < float(errors[0].mean()) - 0.1


def test_goals_are_of_policies_that_have_them() -> None:
    with pytest.raises(ValueError, match="nearest_goal needs a policy that has goals"):
        NearestGoal(MLPField(21, (8, 2)))


def test_a_manoeuvre_is_told_where_it_ends(tmp_path: Path) -> None:
    demos = make_demos("toy_drive", tmp_path / "drive", num_episodes=60)
    chunks = CLONING.chunks(demos)
    assert len(chunks) == 60  # whole episodes, from their first step
    obs, action = chunks[torch.arange(60)]
    torch.testing.assert_close(obs["goal"], trajectory(obs["obs"], action.unsqueeze(1))[:, 0, -1])
    field, _ = replace(CLONING, vocabulary=6).network(demos)
    assert isinstance(field, GoalField)
    near = torch.cdist(obs["goal"], field.goals).amin(1)
    assert float(near.mean()) < float(torch.cdist(obs["goal"], obs["goal"].mean(0, keepdim=True)).mean()) / 2
    torch.manual_seed(0)
    before = torch.cdist(obs["goal"], field.goals).gather(1, field.score(obs["obs"])[0].argmax(1, keepdim=True)).mean()
    fit_scores(field, chunks, 150, rows=64)
    after = torch.cdist(obs["goal"], field.goals).gather(1, field.score(obs["obs"])[0].argmax(1, keepdim=True)).mean()
    assert float(after) < float(before) - 3


@pytest.mark.slow
def test_the_command_and_what_it_judges(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    made = replace(CLONING, judged=16, num_demos=80, score_steps=3, vocabulary=8)
    main(made, ["--demos", "d", "--steps", "3", "--out", "made", "--loss", "l1"])
    said = capsys.readouterr().out
    assert "--loss l1" in said
    for name in ("no goal, K = 10", "goal, K = 1, best of 16", "other scenes' goals, K = 4"):
        assert name in said
    spec = "policy={field: made, select: {name: best_of, num: 4, scorer: nearest_goal}}"
    assert recipes.load("robot_reach_reinflow", [spec, "env.name=toy_drive", "env.settings={}"]).policy.select
