"""Returns to go by hand, what the control learns from, data of mixed quality, and the command."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlflow.deploy.runs import Asked, evaluator_of
from rlflow.envs.demos.dataset import Demos, Episode, write_demos
from rlflow.envs.demos.demonstrators import demonstrator
from rlflow.pretrain.guided import GUIDED
from rlflow.pretrain.worlds import main


def hopper_demos(folder: Path, num: int = 6, length: int = 5) -> Demos:
    """Episode e earns e + 1 a step."""
    rng = torch.Generator().manual_seed(0)
    episodes = [
        Episode(
            torch.randn(length + e, 11, generator=rng),
            torch.rand(length + e, 3, generator=rng) - 0.5,
            torch.full((length + e,), e + 1.0),
            e % 2 == 0,
            e % 2 == 1,
        )
        for e in range(num)
    ]
    return write_demos(folder, episodes, {"name": "hopper"}, {"command": "by hand"}, shard_rows=7)


def test_returns_to_go_by_hand(tmp_path: Path) -> None:
    demos = hopper_demos(tmp_path / "d", num=3, length=2)
    assert demos.returns_to_go().tolist() == [2, 1, 6, 4, 2, 12, 9, 6, 3]
    held = demos.split(every=2)[1]
    assert torch.equal(held.returns_to_go(), demos.returns_to_go())  # of the whole folder, as its steps are numbered


def test_chunks_are_told_their_own_return_and_of_the_control_another(tmp_path: Path) -> None:
    demos = hopper_demos(tmp_path / "d")
    cloning = GUIDED["robot_guided_hopper"]
    told, dealt = cloning.chunks(demos), replace(cloning, permute=True).chunks(demos)
    index = torch.arange(len(told))
    (obs, action), (other, same) = told[index], dealt[index]
    assert torch.equal(obs["target"][:, 0], demos.returns_to_go()[told.starts])
    assert torch.equal(action, same)
    assert torch.equal(obs["obs"], other["obs"])
    assert float((obs["target"] == other["target"]).float().mean()) < 0.5
    assert torch.equal(dealt.targets.sort().values, told.targets.sort().values)
    assert torch.equal(demos.chunks(4)[index][1], action)


def test_noise_of_mixed_data_rises_from_nothing(tmp_path: Path) -> None:
    """The first episode is the expert's own play."""
    pure = demonstrator("hopper", noise=None)
    mixed = demonstrator("hopper_mixed", noise=3.0)
    alone, many = (list(who.episodes(6, 0)[0]) for who in (pure, mixed))
    assert not torch.equal(many[-1].action[:4], alone[-1].action[:4])
    assert (many[-1].action.abs() == 1).float().mean() > (many[0].action.abs() == 1).float().mean() + 0.2
    assert mixed.options == " --noise 3"
    with pytest.raises(ValueError, match="or ask for hopper_mixed"):
        demonstrator("hopper", noise=1.0)


@pytest.mark.slow
def test_the_command_and_its_evaluation(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    hopper_demos(tmp_path / "d")
    cloning = replace(GUIDED["robot_guided_hopper"], judged=10)
    main(cloning, ["--demos", "d", "--steps", "3", "--out", "made", "--permute"])
    said = capsys.readouterr().out
    assert '"rank_correlation"' in said
    assert "--permute" in said
    result = evaluator_of("made", Asked(num=10))()
    assert [*result.by_task()] == [f"return {t:g}" for t in result.targets]
    assert -1 <= result.means()["rank_correlation"] <= 1
