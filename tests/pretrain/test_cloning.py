"""Behaviour cloning: both modes are reproduced, the command makes a checkpoint that says what it is worth."""

import json
from dataclasses import replace

import pytest
import torch

from rlflow.envs.demos.dataset import Episode, write_demos
from rlflow.flow.grid import uniform_times
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.matching import ShortcutLoss, cfm_loss
from rlflow.flow.policy import FlowPolicy
from rlflow.models.io import load_field
from rlflow.models.mlp import MLPField
from rlflow.pretrain.cloning import CLONINGS, demos_of, validation_loss
from rlflow.pretrain.matching import pretrain
from rlflow.pretrain.worlds import WORLDS, main


def two_modes(num: int = 40):
    """Endless batches: actions near +1 or -1, three times as often the sign that the observation names."""
    rng = torch.Generator().manual_seed(0)
    while True:
        obs = torch.randint(2, (256, 1), generator=rng) * 2.0 - 1
        sign = torch.where(torch.rand(256, 1, generator=rng) < 0.75, obs, -obs)
        yield (sign + 0.05 * torch.randn(256, 2, generator=rng)).unsqueeze(-1), obs


@pytest.mark.parametrize(("average", "num_steps"), [(False, 8), (True, 1)])
def test_both_modes_are_reproduced(average, num_steps):
    """A mean of the demonstrations would lie at +-.5; a Shortcut field needs one step."""
    torch.manual_seed(0)
    field = MLPField(1, (2, 1), width=64, depth=2, average=average)
    loss = ShortcutLoss() if average else cfm_loss
    field = pretrain(field, two_modes(), steps=800, drop=0.0, times=uniform_times, loss=loss, autocast=False)
    policy = FlowPolicy(field, FlowSDE(), num_steps=num_steps)
    with torch.no_grad():
        action = policy.sample(policy.encode(torch.ones(2000, 1))).final.squeeze(-1)
    share = (action > 0).all(1).float().mean().item()
    assert share == pytest.approx(0.75, abs=0.08)
    near = ((action.abs() - 1).abs() < 0.35).all(1).float().mean().item()
    assert near > (0.4 if average else 0.85)  # one step of a field without averages would get none right
    assert (action[:, 0].sign() == action[:, 1].sign()).float().mean() > 0.97


@pytest.fixture
def tiny(tmp_path):
    """Standing still in front of the Hopper environment."""
    episodes = [
        Episode(torch.randn(30, 11), torch.randn(30, 3).clamp(-1, 1), torch.ones(30), True, False) for _ in range(4)
    ]
    return write_demos(tmp_path / "demos", episodes, {"name": "hopper"}, {"command": "by hand"})


def test_validation_loss_is_that_of_held_out_data(tiny):
    """For a field that is zero it is E|a - x_0|^2 = E|a|^2 + 1."""
    field = MLPField(11, (4, 3), width=8)
    for parameter in field.parameters():
        parameter.data.zero_()
    chunks = tiny.split()[1].chunks(4)
    _, action = chunks[torch.arange(len(chunks))]
    assert validation_loss(field, chunks) == pytest.approx(action.square().mean().item() + 1, abs=0.2)
    assert validation_loss(field, chunks) == validation_loss(field, chunks)


@pytest.mark.parametrize("name", ["robot_bc_hopper", "robot_bc_hopper_shortcut"])
def test_command_makes_a_checkpoint_with_its_return(name, tiny, tmp_path, capsys):
    pytest.importorskip("mujoco")
    out = tmp_path / "made"
    main(WORLDS[name], ["--steps", "3", "--demos", str(tiny.folder), "--out", str(out), "--coupling", "ot"])
    printed = json.loads("{" + capsys.readouterr().out.partition("\n{")[2])
    about = json.loads((out / "config.json").read_text())
    assert about["made_by"] == printed
    assert about["made_by"]["demonstrations"]["command"] == "by hand"
    assert about["made_by"]["demonstrations"]["mean_return"] == 30
    assert 0 < about["made_by"]["return"] < 500
    assert ("return_k1" in about["made_by"]) == name.endswith("shortcut")
    assert about["judged_by"]["env"] == {"name": "hopper"}
    field = load_field(str(out))
    assert field.event_shape == (4, 3)
    assert torch.equal(field.normalizer.moments, tiny.moments)
    with pytest.raises(FileExistsError):
        main(WORLDS[name], ["--out", str(out)])


def test_where_success_is_told_it_is_kept(tmp_path):
    """A cube policy of no training: chunks of five actions, its success beside that of the demonstrations."""
    pytest.importorskip("ogbench")
    episodes = [
        Episode(torch.randn(20, 28), torch.randn(20, 5).clamp(-1, 1), -torch.ones(20), won, not won, won)
        for won in (True, True, False, True)
    ]
    write_demos(tmp_path / "demos", episodes, {"name": "cube_single"}, {"command": "by hand"})
    two = replace(WORLDS["robot_bc_cube"], judged=2)
    main(two, ["--steps", "2", "--demos", str(tmp_path / "demos"), "--out", str(tmp_path / "a")])
    made_by = json.loads((tmp_path / "a/config.json").read_text())["made_by"]
    assert made_by["success"] in (0, 0.5, 1)
    assert -200 <= made_by["return"] < 0
    assert made_by["demonstrations"]["success"] == 0.75
    assert load_field(str(tmp_path / "a")).event_shape == (5, 5)


def test_demonstrations_of_another_environment_are_refused(tiny):
    with pytest.raises(ValueError, match="of hopper, not of walker2d"):
        demos_of("walker2d", tiny.folder)


def test_every_cloning_has_its_own_folder():
    assert len({c.asset for c in CLONINGS.values()}) == len(CLONINGS)
