"""What is still to be earned: by hand over chunks, ends by the task and by time, new episodes and a resume."""

import pytest
import torch
from torch import Tensor

from rlflow.assembly.environment import make_simulator
from rlflow.config import recipes
from rlflow.envs.simulators.toy import ToyMDP, ToyReach
from rlflow.envs.targets import Targeted, rank_correlation
from rlflow.envs.wrappers import Wrapper
from rlflow.evaluation.episodes import Episodes
from rlflow.types import Step


def draw(step: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def test_the_target_is_lowered_by_what_was_earned_and_begins_anew() -> None:
    """Undiscounted, though the chunks' rewards are not: two commands a chunk, four chunks an episode."""
    env, bare = Targeted(ToyReach(6, gamma=0.5), [10.0, 20.0]), ToyReach(6, gamma=1.0)
    obs = env.reset(torch.arange(6))
    bare.reset(torch.arange(6))
    first = torch.tensor([10.0, 20.0] * 3)
    assert torch.equal(obs["target"][:, 0], first)
    left = first.clone()
    for step in range(9):
        action = draw(step, 6, 2, 2)
        told, raw = env.step(action), bare.step(action)
        left = left - raw.reward
        torch.testing.assert_close(told.final_obs["target"][:, 0], left)
        left = torch.where(raw.ended, first, left)
        torch.testing.assert_close(told.obs["target"][:, 0], left)
        assert torch.equal(told.obs["state"], raw.obs["state"])
        assert bool(raw.truncated.all()) == (step in (3, 7))


def test_an_end_by_the_task_and_a_reset_of_some_rows() -> None:
    env = Targeted(ToyMDP(5), [3.0])
    env.reset(torch.arange(5))
    for step in range(12):
        told = env.step(draw(step, 5, 1, 1))
        short = 3 - told.info["episode_return"]
        torch.testing.assert_close(told.final_obs["target"][told.ended, 0], short[told.ended])
        assert bool((told.obs["target"][told.ended] == 3).all())
    env.step(draw(99, 5, 1, 1))
    left = 3 - env.earned
    mask = torch.tensor([True, False, True, False, False])
    obs = env.reset(7 + torch.arange(5), mask)
    torch.testing.assert_close(obs["target"][:, 0], torch.where(mask, torch.tensor(3.0), left))


def test_goes_on_from_where_it_was_saved() -> None:
    envs = [Targeted(ToyReach(6), [1.0, 2.0, 3.0]) for _ in range(2)]
    envs[0].reset(1 + torch.arange(6))
    envs[1].reset(torch.arange(6))
    for step in range(2):
        envs[0].step(draw(step, 6, 2, 2))
    envs[1].load_state_dict(envs[0].state_dict())
    for step in range(2, 7):
        ours, again = (env.step(draw(step, 6, 2, 2)) for env in envs)
        assert torch.equal(ours.obs["target"], again.obs["target"])
    assert torch.equal(envs[1].asked, torch.tensor([1, 2, 0, 1, 2, 0]))


def test_says_what_is_shown_and_refuses_what_keeps_no_books() -> None:
    env = Targeted(ToyReach(2), [1.0, 5.0])
    assert {name: tuple(v.shape) for name, v in env.obs_spec.items()} == {"state": (2,), "goal": (2,), "target": (1,)}
    assert env.tasks == ["return 1", "return 5"]

    class Silent(Wrapper):
        @property
        def earned(self) -> Tensor:
            raise NotImplementedError("give it `earned`")

        def recv(self) -> Step:
            return self.env.recv()

    with pytest.raises(NotImplementedError, match="give it `earned`"):
        Targeted(Silent(ToyReach(2)), [1.0])
    with pytest.raises(ValueError, match="asked different tasks already"):
        Targeted(env, [1.0])


def test_rank_correlation_by_hand() -> None:
    asked = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert rank_correlation(asked, torch.tensor([1.0, 4.0, 9.0, 16.0, 90.0])) == pytest.approx(1)
    assert rank_correlation(asked, -asked) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)), d = 1, -1, 0, 0, 0
    assert rank_correlation(asked, torch.tensor([2.0, 1.0, 3.0, 4.0, 5.0])) == pytest.approx(1 - 12 / 120)
    assert rank_correlation(asked, torch.ones(5)) == 0


def test_evaluations_tell_each_targets_mean_return_and_how_they_follow() -> None:
    returns, task = torch.tensor([1.0, 10.0, 5.0, 3.0, 12.0, 7.0]), torch.tensor([0, 1, 2, 0, 1, 2])
    told = Episodes({"return": returns}, task=task, tasks=["a", "b", "c"], targets=[1.0, 2.0, 3.0])
    assert told.by_task() == {"a": 2.0, "b": 11.0, "c": 6.0}
    assert told.means()["rank_correlation"] == pytest.approx(0.5)  # 1, 3, 2 for 1, 2, 3
    assert "rank_correlation" not in Episodes({"return": returns}, task=task, tasks=["a", "b", "c"]).means()


def test_a_recipe_asks_for_returns() -> None:
    config = recipes.load("robot_reach_reinflow", ["env.targets=[1, 2.5]"])
    env = make_simulator(config, 4)
    assert env.reset(torch.arange(4))["target"][:, 0].tolist() == [1, 2.5, 1, 2.5]
    for recipe, given, said in (
        ("t2i_nft", ["env.targets=[1]"], "env.targets: is of simulators"),
        ("robot_reach_reinflow", ["env.targets=[1]", "env.frame_stack=2"], "env.targets: is shown beside single"),
    ):
        with pytest.raises(ValueError, match=said):
            recipes.load(recipe, given)
    with pytest.raises(ValueError, match=r"env\.targets: name at least one return"):
        make_simulator(recipes.load("robot_reach_reinflow", ["env.targets=[]"]), 4)
