"""Behaviour cloning: both modes are reproduced, the command makes a checkpoint that says what it is worth."""

import json
from dataclasses import replace

import pytest
import torch

from rlflow import console
from rlflow.cli import main as cli
from rlflow.envs.demos.dataset import Demos, Episode, write_demos
from rlflow.flow.grid import uniform_times
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.matching import ShortcutLoss, cfm_loss
from rlflow.flow.policy import FlowPolicy
from rlflow.models.io import load_field
from rlflow.models.mlp import MLPField
from rlflow.pretrain import cloning
from rlflow.pretrain.cloning import CLONINGS, demos_of, validation_loss
from rlflow.pretrain.few_steps import FEW_STEPS
from rlflow.pretrain.matching import pretrain
from rlflow.pretrain.worlds import WORLDS, main
from rlflow.train.trainer import Trainer
from rlflow.trust import UntrustedCodeError


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


@pytest.mark.parametrize("name", ["robot_bc_hopper", "robot_bc_hopper_shortcut", "robot_bc_hopper_meanflow"])
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
    assert ("return_k1" in about["made_by"]) == (name in FEW_STEPS)
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


def test_demonstrations_that_are_made_say_how_far_they_are(tmp_path, monkeypatch, capsys):
    """Each step of all episodes here; of a command, one line in ten seconds."""
    monkeypatch.setattr(console, "EVERY", 0.0)
    demos_of("tabletop", tmp_path / "demos", num=6)
    first, *steps, last = capsys.readouterr().out.splitlines()
    assert first.endswith("demonstrations of tabletop are made")
    assert [line.partition("  ")[0] for line in steps] == [
        f"{i} of 40 steps of 12 episodes" for i in range(1, 1 + len(steps))
    ]
    assert len(steps) > 5
    assert all(line.endswith(" s left") for line in steps)
    assert last == Demos.open(tmp_path / "demos").summary


def test_demonstrations_of_another_environment_are_refused(tiny):
    with pytest.raises(ValueError, match="are of another env: they are of hopper, not of walker2d"):
        demos_of("walker2d", tiny.folder)


def test_demonstrations_of_other_settings_are_refused_before_any_are_made(tmp_path):
    """Those that would be made are of the default ones."""
    settings = {"env_id": "Pendulum-v1"}
    write_demos(tmp_path / "d", SWINGS, {"name": "gym", "settings": settings | {"chunk": 2}}, {})
    assert demos_of("gym", tmp_path / "d", settings).env["settings"]["chunk"] == 2
    with pytest.raises(ValueError, match="env.settings.env_id: 'Pendulum-v1' there, 'Other-v0' here"):
        demos_of("gym", tmp_path / "d", {"env_id": "Other-v0"})
    with pytest.raises(ValueError, match="would be of another env: env.settings.env_id: None there"):
        demos_of("gym", tmp_path / "none", settings)
    assert not (tmp_path / "none").exists()


def swing(length: int = 30, numbers: int = 3) -> Episode:
    return Episode(torch.randn(length, numbers), torch.rand(length, 1) * 2 - 1, -torch.ones(length), False, True)


SWINGS = [swing() for _ in range(4)]
ITS = {"name": "gym", "settings": {"env_id": "Pendulum-v1", "max_steps": 8}}


@pytest.mark.slow
def test_a_clone_of_any_environment_is_judged_and_trains(tmp_path, capsys):
    """By the command alone: the folder says which environment, with its settings; the checkpoint says so too."""
    write_demos(tmp_path / "d", SWINGS, ITS, {"command": "by hand"})
    arguments = ["--steps", "3", "--demos", str(tmp_path / "d"), "--chunk", "2", "--judged", "2"]
    cli(["pretrain", "robot_bc", *arguments, "--out", str(tmp_path / "mine")])
    about = json.loads((tmp_path / "mine/config.json").read_text())
    assert about["judged_by"]["env"] == {"name": "gym", "settings": ITS["settings"] | {"chunk": 2}}
    assert about["made_by"]["return"] < 0
    assert "success" not in about["made_by"], "Pendulum does not tell"
    assert cli(["eval", str(tmp_path / "mine"), "--num", "2"]) in (0, None)
    field = load_field(str(tmp_path / "mine"))
    assert torch.equal(field.normalizer.moments, Demos.open(tmp_path / "d").moments)
    settings = ITS["settings"] | {"chunk": 2}
    values = [f"policy.field={tmp_path / 'mine'}", "env.name=gym", f"env.settings={settings}", "env.num_groups=4"]
    values += ["env.horizon=4", "algorithm.num_minibatches=1", "train.iterations=1", "train.minutes=null", "eval.num=2"]
    trainer = Trainer("robot_reinflow", tmp_path / "run", overrides=values, quiet=True)
    assert trainer.fit()["eval/heldout/return"] < 0
    assert (tmp_path / "run/model/config.json").exists()


class TestBeforeWork:
    """What a policy could not be judged, or used, for is said before it is trained."""

    @pytest.fixture(autouse=True)
    def _nothing_is_trained(self, monkeypatch):
        monkeypatch.setattr(cloning, "pretrain", lambda *args, **settings: pytest.fail("was trained"))

    def made(self, tmp_path, episodes, env=ITS, *options):
        write_demos(tmp_path / "d", episodes, env, {})
        main(WORLDS["robot_bc"], ["--demos", str(tmp_path / "d"), "--out", str(tmp_path / "out"), *options])

    def test_held_out_episodes_shorter_than_a_chunk(self, tmp_path):
        with pytest.raises(ValueError, match="of 1 episodes none fills a chunk of 4 steps, the longest has 3"):
            self.made(tmp_path, [swing(8), swing(8), swing(8), swing(3)])

    def test_an_environment_that_shows_something_else(self, tmp_path):
        with pytest.raises(ValueError, match=r"what was seen is .*\(2,\).* the environment shows .*\(3,\)"):
            self.made(tmp_path, [swing(numbers=2)] * 2)

    def test_an_environment_that_does_not_exist(self, tmp_path):
        with pytest.raises(ValueError, match="unknown env 'gymm'"):
            self.made(tmp_path, SWINGS, {"name": "gymm"})

    def test_an_environment_outside_rlflow_needs_trust(self, tmp_path):
        with pytest.raises(UntrustedCodeError, match="--trust-code"):
            self.made(tmp_path, SWINGS, {"name": "tests.train.test_broken_rows:Glitch"})

    def test_an_environment_without_chunks(self, tmp_path):
        with pytest.raises(ValueError, match="env toy_reach takes no chunks of actions: use --chunk 1"):
            self.made(tmp_path, SWINGS, {"name": "toy_reach"})

    def test_settings_it_does_not_have(self, tmp_path):
        with pytest.raises(ValueError, match="env.settings.nothing: gym has no such setting"):
            self.made(tmp_path, SWINGS, {"name": "gym", "settings": ITS["settings"] | {"nothing": 1}})


def test_every_cloning_has_its_own_folder():
    clonings = CLONINGS | FEW_STEPS
    assert len(clonings) == len(CLONINGS) + len(FEW_STEPS)
    assert len({c.asset for c in clonings.values()}) == len(clonings)
