"""The MLP field keeps the contract of a VelocityField: shapes, conditions, time features, dt."""

import math

import pytest
import torch
from torch import Tensor

from rlflow.models.mlp import MLPField, TimeFeatures, mlp, side_by_side

EVENT = (2, 3)


def inputs(num: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(num, *EVENT), torch.rand(num), torch.rand(num)


@pytest.fixture
def field() -> MLPField:
    return MLPField(4, EVENT, width=16).requires_grad_(False)


def test_velocity_has_the_shape_of_the_event(field):
    v = field(*inputs(), field.encode(torch.randn(5, 4)))
    assert v.shape == (5, *EVENT)
    assert field.event_shape == EVENT
    assert field.num_features == 4


def test_layers_alternate_and_end_linear():
    names = [type(layer).__name__ for layer in mlp([3, 8, 8, 2])]
    assert names == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]


def test_each_input_matters(field):
    x, t, dt = inputs()
    cond = field.encode(torch.randn(5, 4))
    base = field(x, t, dt, cond)
    for changed in [(x + 1, t, dt, cond), (x, t + 0.1, dt, cond), (x, t, dt, field.encode(torch.randn(5, 4)))]:
        assert not torch.isclose(field(*changed), base).flatten(1).all(1).any()


def test_dt_is_read_by_an_average_field_only(field):
    x, t, dt = inputs()
    average = MLPField(4, EVENT, width=16, average=True).requires_grad_(False)
    for net, reads in ((field, False), (average, True)):
        cond = net.encode(torch.ones(5, 4))
        assert net.uses_dt is reads
        assert net.has_instantaneous
        assert torch.equal(net(x, t, dt, cond), net(x, t, 0 * dt, cond)) is not reads


def test_rows_do_not_mix(field):
    x, t, dt = inputs()
    cond = field.encode(torch.randn(5, 4))
    rows = torch.tensor([3, 1])
    alone = field(x[rows], t[rows], dt[rows], cond.index(rows))
    torch.testing.assert_close(alone, field(x, t, dt, cond)[rows])


def test_dict_observations_are_concatenated_in_the_order_of_their_names(field):
    a, b = torch.randn(5, 1, 2), torch.randn(5, 2)
    pooled = field.encode({"b": b, "a": a})["pooled"]
    assert torch.equal(pooled, torch.cat([a.flatten(1), b], 1))


def test_an_entry_may_be_a_single_number():
    """As the height of DM control's walker is."""
    height, rest = torch.randn(5), torch.randn(5, 2, 3)
    found = side_by_side({"rest": rest, "height": height})
    assert torch.equal(found, torch.cat([height[:, None], rest.flatten(1)], 1))
    assert side_by_side({"rest": rest[:0], "height": height[:0]}).shape == (0, 7)


def test_observations_take_the_dtype_of_the_weights(field):
    assert field.encode(torch.randn(5, 4, dtype=torch.float64))["pooled"].dtype == torch.float32
    assert field.double().encode(torch.randn(5, 4))["pooled"].dtype == torch.float64


def test_null_is_the_zero_observation(field):
    cond = field.null(field.encode(torch.randn(5, 4)))
    assert torch.equal(cond["pooled"], torch.zeros(5, 4))


def test_has_no_encoder_to_train_and_decodes_to_itself(field):
    x = torch.randn(5, *EVENT)
    assert field.encoder_parameters() == []
    assert torch.equal(field.decode(x), x)


class TestTimeFeatures:
    def test_are_sines_and_cosines_from_half_a_period_to_32(self):
        t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
        angle = t[:, None] * math.pi * torch.tensor([2.0 ** (6 * i / 7) for i in range(8)], dtype=torch.float64)
        expected = torch.cat([angle.sin(), angle.cos()], -1)
        torch.testing.assert_close(TimeFeatures()(t), expected, rtol=0, atol=1e-4)

    def test_tell_any_two_times_apart(self):
        features = TimeFeatures()(torch.linspace(0, 1, 1001))
        distance = torch.cdist(features, features) + torch.eye(1001)
        assert float(distance.min()) > 0.01

    def test_stay_out_of_the_checkpoint(self):
        assert not TimeFeatures().state_dict()


def test_float64_field_computes_in_float64(field):
    field.double()
    x, t, dt = (z.double() for z in inputs())
    assert field(x, t, dt, field.encode(torch.randn(5, 4))).dtype == torch.float64


def test_arguments_rebuild_the_field():
    field = MLPField(4, EVENT, width=8, depth=3, average=True)
    again = MLPField(**field.args)
    again.load_state_dict(field.state_dict())
    x, t, dt = inputs()
    cond = field.encode(torch.randn(5, 4))
    assert torch.equal(again(x, t, dt, cond), field(x, t, dt, cond))
