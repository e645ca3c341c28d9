"""Functions and classes in a config made in Python: named by what another process can import, else said."""

import json
import warnings

import pytest

from rlflow import registry
from rlflow.config import recipes
from rlflow.config.given import name_components
from rlflow.config.schema import Config, RewardConfig, TrainConfig
from rlflow.flow.kernels import FlowSDE, MarginalSDE
from rlflow.rewards.colour import brightness

HERE = f"{__name__}:"


def darkness(images):
    """(N,) how dark."""
    return 1 - images.mean(dim=(1, 2, 3))


class SineSDE(MarginalSDE):
    """A kernel of one's own."""

    def __init__(self, a: float = 0.5):
        super().__init__()
        self.a = a

    def g(self, t, t_next):
        return self.a * t


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    monkeypatch.setattr(registry, "GIVEN", {})


def test_what_can_be_imported_is_named_by_its_path():
    """As key and as value, in a list too; a registered one by its name; the config is plain values, and trusted."""
    values = {
        "base": "t2i_flow_grpo",
        "policy": {"kernel": {"name": SineSDE, "a": 0.7}},
        "reward": {"weights": {darkness: 1.0, brightness: 0.5}},
        "eval": {"metrics": {"dark": darkness}},
    }
    config = recipes.load(values)
    assert config.policy.kernel == {"name": f"{HERE}SineSDE", "a": 0.7}
    assert config.reward.weights == {f"{HERE}darkness": 1.0, "brightness": 0.5}
    assert config.eval.metrics == {"dark": f"{HERE}darkness"}
    assert config.about == recipes.load("t2i_flow_grpo").about, "the base is read"
    assert darkness in values["reward"]["weights"], "the values given are left alone"
    assert name_components({"a": [FlowSDE]}) == {"a": ["flow_sde"]}
    json.dumps(config.to_dict())
    assert registry.find("reward", f"{HERE}darkness") is darkness, "who gives code trusts it"


def test_a_config_object_may_hold_them_too():
    config = Config(reward=RewardConfig(weights={darkness: 1.0}), train=TrainConfig(iterations=1))
    assert recipes.load(config).reward.weights == {f"{HERE}darkness": 1.0}


def test_what_cannot_be_imported_is_said():
    """A notebook's function: it works here, and elsewhere the message says what to do."""

    def redness(images):
        return images[:, 0].mean(dim=(1, 2))

    with pytest.warns(UserWarning, match="redness lies in no module .* resumes only where it is given again"):
        config = recipes.load({"base": "t2i_flow_grpo", "reward": {"weights": {redness: 1.0}}})
    assert config.reward.weights == {"given:redness": 1.0}
    assert registry.find("reward", "given:redness") is redness
    registry.GIVEN.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recipes.load(config).reward.weights == config.reward.weights, "a run without it still loads and samples"
    with pytest.raises(ValueError, match="reward 'given:redness' was given in Python .* the same function again"):
        registry.find("reward", "given:redness")
    with pytest.raises(ValueError, match="kernel 'given:x' was given in Python"):
        recipes.load("t2i_flow_grpo", ["policy.kernel=given:x"])


def test_a_wrapped_component_does_not_take_the_name_of_another():
    """functools.wraps copies names; the registered reward stays what it is."""
    import functools

    @functools.wraps(brightness)
    def louder(images):
        return 2 * brightness(images)

    assert registry.give(louder) == "given:brightness"
    assert registry.find("reward", "brightness") is brightness


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward": {"weights": {lambda images: images: 1.0}}}, r"^reward\.weights: a lambda has no name"),
        (
            {"policy": {"kernel": SineSDE()}},
            r"^policy\.kernel: SineSDE.* give a function, or a class with its settings",
        ),
    ],
)
def test_what_has_no_name_is_refused_where_it_stands(values, message):
    with pytest.raises(ValueError, match=message):
        name_components(values)


def test_two_of_one_name_are_refused():
    def make():
        def score(images):
            return images

        return score

    with pytest.raises(ValueError, match="two components are called 'given:score': rename one"):
        name_components({"reward": {"weights": {make(): 1.0, make(): 0.5}}})
