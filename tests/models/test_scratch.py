"""From what a simulator shows to the network that reads it: numbers, a picture, both, in either layout."""

import pytest
import torch
from torch import Tensor

from rlflow.models.cnn import PixelField
from rlflow.models.mlp import MLPField
from rlflow.models.scratch import Seen, make_field, scratch

EVENT = (2, 3)
PICTURE = torch.empty(20, 20, 3, dtype=torch.uint8, device="meta")
NUMBERS = torch.empty(5, device="meta")


def shown(spec: object, num: int = 4) -> object:
    """Random observations of a specification."""
    if isinstance(spec, dict):
        return {name: shown(entry, num) for name, entry in spec.items()}
    assert isinstance(spec, Tensor)
    if spec.dtype == torch.uint8:
        return torch.randint(0, 256, (num, *spec.shape), dtype=torch.uint8)
    return torch.randn(num, *spec.shape)


@pytest.mark.parametrize(
    ("spec", "model", "features"),
    [
        (NUMBERS, MLPField, 5),
        ({"arm": NUMBERS, "goal": torch.empty(2, 2, device="meta")}, MLPField, 9),
        (torch.empty(128, dtype=torch.uint8, device="meta"), MLPField, 128),  # bytes, but no picture
        (PICTURE, PixelField, 128),
        ({"front": PICTURE, "arm": NUMBERS}, PixelField, 133),
        ({"front": PICTURE.permute(2, 0, 1), "arm": NUMBERS}, PixelField, 133),
    ],
)
def test_the_network_is_the_one_that_reads_what_is_shown(spec, model, features):
    torch.manual_seed(0)
    field = scratch(EVENT, spec)
    assert type(field) is model
    obs = shown(spec)
    cond = field.encode(obs)
    assert cond["pooled"].shape == (4, features) == (4, field.num_features)
    x = torch.randn(4, *EVENT), torch.rand(4), torch.zeros(4)
    assert field(*x, cond).shape == (4, *EVENT)
    again = model(**field.args)  # what a checkpoint does
    again.load_state_dict(field.state_dict())
    assert torch.equal(again(*x, again.encode(obs)), field(*x, cond))


def test_the_layout_of_a_picture_is_told_by_its_sides():
    assert not Seen.of(PICTURE).channels_first
    assert Seen.of(PICTURE.permute(2, 0, 1)).channels_first


def test_numbers_beside_a_picture_are_normalised_and_by_nothing_of_the_picture():
    """Positions of hundreds of pixels beside features of size 1 would be all that the network hears."""
    spec = {"front": PICTURE, "arm": NUMBERS}
    field, obs = scratch(EVENT, spec), shown(spec, 64)
    obs["arm"] = 300 + 50 * obs["arm"]
    assert field.encode(obs)["pooled"][:, 128:].abs().mean() > 200
    field.observe(obs)
    seen = field.encode(obs)["pooled"][:, 128:]
    torch.testing.assert_close(seen.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.std(0, correction=0), torch.ones(5), atol=1e-3, rtol=0)
    fixed = scratch(EVENT, spec, running=False)
    fixed.observe(obs)
    assert float(fixed.normalizer.moments[0, 0]) == 0


def test_what_no_network_reads_is_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"nests dictionaries under \['arm'\]: flatten"):
        scratch(EVENT, {"arm": {"left": NUMBERS}})
    with pytest.raises(ValueError, match=r"pictures \['front', 'wrist'\], and one can be read: stack"):
        scratch(EVENT, {"front": PICTURE, "wrist": PICTURE})
    with pytest.raises(ValueError, match=r"does not tell what it shows: give it an obs_spec"):
        scratch(EVENT, None)
    with pytest.raises(
        ValueError, match=r"mlp reads numbers and the simulator shows a picture .*: use scratch, or pixel"
    ):
        make_field("mlp", PICTURE, EVENT)
    with pytest.raises(
        ValueError, match=r"pixel reads a picture and the simulator shows 5 numbers: use scratch, or mlp"
    ):
        make_field("pixel", NUMBERS, EVENT)


def test_settings_reach_the_network_that_was_chosen():
    assert make_field({"name": "scratch", "width": 32}, NUMBERS, EVENT).args["width"] == 32
    made = make_field({"name": "pixel", "encoding": 16}, {"front": PICTURE, "arm": NUMBERS}, EVENT)
    assert (made.args["encoding"], made.args["camera"], made.args["state_dim"]) == (16, "front", 5)
    with pytest.raises(ValueError, match=r"policy\.field\.camera: pixel has no such setting"):
        make_field({"name": "pixel", "camera": "wrist"}, {"front": PICTURE}, EVENT)
