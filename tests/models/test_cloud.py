"""Clouds of points: sets, so neither order nor repetition counts; their channels are normalised over all points."""

import pytest
import torch
from torch import Tensor

from rlflow.models.cnn import CloudField
from rlflow.models.scratch import fit_normalizers, make_field, scratch
from rlflow.parallel.moments import merge, no_moments, pooled, scale

EVENT = (2, 3)


def made(**settings: object) -> CloudField:
    torch.manual_seed(0)
    return CloudField(EVENT, **({"points": (20, 3), "width": 32, "encoding": 16} | settings))


def points(num: int = 4, channels: int = 3) -> Tensor:
    return torch.randn(num, 20, channels, generator=torch.Generator().manual_seed(2))


def seen(field: CloudField, obs: object) -> Tensor:
    return field.encode(obs)["pooled"]


def test_the_order_of_points_does_not_matter():
    field, cloud = made(), points()
    order = torch.stack([torch.randperm(20) for _ in range(4)])
    mixed = cloud.gather(1, order.unsqueeze(-1).expand_as(cloud))
    assert not torch.equal(mixed, cloud)
    torch.testing.assert_close(seen(field, mixed), seen(field, cloud), rtol=0, atol=1e-6)


def test_how_often_a_point_is_there_does_not_matter():
    """So a cloud of seven points may be filled up by any of them."""
    field, few = made(), points()[:, :7]
    one, two = (few[:, index] for index in (torch.arange(20) % 7, torch.arange(20).clamp(max=6)))
    torch.testing.assert_close(seen(field, one), seen(field, two), rtol=0, atol=1e-6)


def test_where_a_point_is_and_what_colour_it_has_matters():
    field, cloud = made(points=(20, 6)), points(channels=6)
    for channel in range(6):
        moved = cloud.clone()
        moved[:, 3, channel] += 2.0
        assert bool((seen(field, moved) - seen(field, cloud)).abs().amax(1).gt(1e-4).any())


def test_rows_do_not_mix_and_numbers_stand_beside():
    field = made(state_dim=5)
    obs = {"cloud": points(), "arm": torch.randn(4, 2), "wrist": torch.randn(4, 3)}
    assert seen(field, obs).shape == (4, 21) == (4, field.num_features)
    torch.testing.assert_close(seen(field, {n: v[1:2] for n, v in obs.items()}), seen(field, obs)[1:2])
    torch.testing.assert_close(seen(field, obs)[:, 16:], torch.cat([obs["arm"], obs["wrist"]], 1))


@pytest.mark.parametrize("frozen", [False, True])
def test_is_rebuilt_from_its_arguments_and_trains_unless_frozen(frozen):
    field = made(state_dim=2, frozen=frozen, average=True, cloud="front")
    other = CloudField(**field.args)
    other.load_state_dict(field.state_dict())
    obs, x = {"front": points(), "s": torch.ones(4, 2)}, (torch.randn(4, *EVENT), torch.rand(4), torch.zeros(4))
    assert torch.equal(field(*x, field.encode(obs)), other(*x, other.encode(obs)))
    assert other.uses_dt
    field(*x, field.encode(obs)).square().sum().backward()
    assert all((p.grad is None) is frozen for p in field.encoder_parameters())


def test_what_is_no_cloud_of_that_shape_is_refused():
    for wrong in (points().long(), points()[:, :7], points(channels=6)):
        with pytest.raises(ValueError, match=r"points must be floats \(N, \*\(20, 3\)\), got"):
            made().encode(wrong)


def moments_of(values: Tensor) -> Tensor:
    return merge(no_moments(values.shape[1:]), values, torch.ones(len(values), dtype=torch.bool))


def test_moments_of_points_are_those_of_all_of_them_at_once():
    cloud = points(64) * torch.tensor([1.0, 3.0, 0.1]) + torch.arange(20.0)[:, None]
    torch.testing.assert_close(pooled(moments_of(cloud)), moments_of(cloud.flatten(0, 1)))


def test_statistics_of_demonstrations_reach_points_and_numbers():
    """In the order of the names: a comes before the cloud, s behind it."""
    obs = {"a": 5 + torch.randn(64, 2), "cloud": 2 * points(64) - 3, "s": torch.randn(64, 3) / 9}
    spec = {name: value[0].to("meta") for name, value in obs.items()}
    field = scratch(EVENT, spec, running=False)
    assert isinstance(field, CloudField)
    fit_normalizers(field, moments_of(torch.cat([v.flatten(1) for v in obs.values()], 1)), spec)
    torch.testing.assert_close(field.channels.moments, moments_of(obs["cloud"].flatten(0, 1)))
    numbers = moments_of(torch.cat([obs["a"], obs["s"]], 1))
    torch.testing.assert_close(field.normalizer.moments, numbers)
    assert float(scale(field.channels.moments)[0]) == pytest.approx(2, abs=0.1)


def test_running_statistics_see_every_point():
    field = made(running=True)
    field.observe(points())
    assert field.channels.moments[0].tolist() == [80.0] * 3


def test_scratch_and_the_registry_know_a_cloud():
    cloud, few = torch.empty(64, 6, device="meta"), torch.empty(8, 3, device="meta")
    field = make_field({"name": "cloud", "width": 16}, {"eye": cloud, "arm": torch.empty(4, device="meta")}, EVENT)
    assert (field.shape, field.sense, field.state_dim) == ((64, 6), "eye", 4)
    assert not isinstance(scratch(EVENT, {"goals": few}), CloudField)  # eight goals are numbers
    with pytest.raises(ValueError, match=r"mlp reads numbers and the simulator shows a cloud \(64, 6\)"):
        make_field("mlp", cloud, EVENT)
    with pytest.raises(ValueError, match="cloud reads a cloud of points and the simulator shows none"):
        make_field("cloud", few, EVENT)
    with pytest.raises(ValueError, match=r"\['p', 'c'\], and one picture or cloud can be read"):
        scratch(EVENT, {"p": torch.empty(8, 8, 3, dtype=torch.uint8, device="meta"), "c": cloud})
