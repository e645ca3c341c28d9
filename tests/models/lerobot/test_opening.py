"""What is said where LeRobot is not, or is another; and names and pictures on their way to a policy."""

from importlib import metadata

import pytest
import torch

from rlflow import registry
from rlflow.config import recipes
from rlflow.failures import one_line
from rlflow.models.lerobot.opening import check_version
from rlflow.models.lerobot.processors import as_picture, flat
from rlflow.types import as_bytes, sentences

FIELD = {"name": "lerobot", "checkpoint": "nowhere/smolvla"}


def installed(monkeypatch, version):
    def asked(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", asked)


@pytest.mark.parametrize("spec", [FIELD, {"name": "lerobot", "type": "pusht"}], ids=["field", "env"])
def test_without_lerobot_the_install_line_is_named(monkeypatch, spec):
    installed(monkeypatch, None)
    kind = "model" if spec is FIELD else "env"
    supplied = {} if spec is FIELD else {"num_envs": 1, "gamma": 0.9}
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lerobot\[smolvla,pi\]==0.6.1' \(Python 3.12") as error:
        registry.build(kind, kind, spec, supplied)
    assert "No module named 'lerobot'" in one_line(error.value)


@pytest.mark.parametrize("version", ["0.5.1", "0.6.0", "0.7.0", "1.0"])
def test_another_version_is_refused_with_its_number(monkeypatch, version):
    installed(monkeypatch, version)
    with pytest.raises(ValueError, match=rf"^lerobot {version} is installed, this adapter fits 0.6.1 to below 0.7"):
        check_version()


@pytest.mark.parametrize("version", ["0.6.1", "0.6.2.dev1", "0.6.12"])
def test_versions_that_fit(monkeypatch, version):
    installed(monkeypatch, version)
    assert check_version() == version


def test_settings_of_a_lora_need_one(monkeypatch):
    installed(monkeypatch, "0.6.1")
    with pytest.raises(ValueError, match="set lora too"):
        registry.build("model", "policy.field", FIELD | {"lora_alpha": 4.0})


def test_recipes_can_be_read_without_lerobot():
    for name in ("vla_pirl_flow_sde", "vla_reinflow", "vla_sac_flow"):
        config = recipes.load(name)
        assert config.policy.field["name"] == config.env.name == "lerobot"
        assert config.policy.squash == "identity", f"{name}: LeRobot's normalised actions go beyond 1"
    config = recipes.load("vla_dsrl")
    assert config.env.frozen.policy["name"] == config.env.name == "lerobot"


def test_entries_get_lerobots_names():
    obs = {"pixels": {"top": 1, "wrist": 2}, "agent_pos": 3, "task": 4, "environment_state": 5, "grip": 6}
    obs["observation.state.more"] = 7
    assert dict(flat(obs)) == {
        "observation.images.top": 1,
        "observation.images.wrist": 2,
        "observation.state": 3,
        "observation.environment_state": 5,
        "observation.grip": 6,
        "observation.state.more": 7,
    }
    assert dict(flat({"pixels": 1})) == {"observation.image": 1}


def test_pictures_of_bytes_are_channels_first_from_0_to_1():
    bytes_last = torch.randint(0, 256, (2, 6, 5, 3), dtype=torch.uint8)
    wanted = bytes_last.permute(0, 3, 1, 2).float() / 255
    assert torch.equal(as_picture(bytes_last), wanted)
    assert torch.equal(as_picture(bytes_last.permute(0, 3, 1, 2)), wanted)
    assert torch.equal(as_picture(wanted), wanted), "a float is one already"


def test_sentences_come_back():
    texts = ["push the T", "", "größer als 1 µm"]
    assert sentences(as_bytes(texts, 32)) == texts
    with pytest.raises(ValueError, match="more than 10 bytes: 'größer"):
        as_bytes(texts, 10)
