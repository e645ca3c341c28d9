"""The pixel field: what it reads, in either layout; what trains; what is kept between rollout and update."""

import pytest
import torch
from torch import Tensor

from rlflow.models.cnn import PixelField

EVENT = (2, 3)


def pictures(num: int = 4, side: int = 20) -> Tensor:
    return torch.randint(0, 256, (num, side, side, 3), dtype=torch.uint8)


def made(**settings: object) -> PixelField:
    torch.manual_seed(0)
    return PixelField(EVENT, **({"pixels": (20, 20, 3), "width": 32, "encoding": 16} | settings))


def inputs(num: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(num, *EVENT), torch.rand(num), torch.zeros(num)


def test_reads_pixels_alone_or_beside_a_state():
    both, alone = made(state_dim=5), made()
    obs = {"pixels": pictures(), "agent": torch.randn(4, 2), "wrist": torch.randn(4, 3)}
    assert both.encode(obs)["pooled"].shape == (4, 21) == (4, both.num_features)
    assert alone.encode(obs["pixels"])["pooled"].shape == (4, 16)
    assert both(*inputs(), both.encode(obs)).shape == (4, *EVENT)
    x = inputs()
    for name in obs:  # each part counts
        changed = obs | {name: obs[name].flip(0)}
        assert not torch.allclose(both(*x, both.encode(changed)), both(*x, both.encode(obs)))


def test_either_layout_of_the_same_picture_is_the_same():
    last, first = made(), made(pixels=(3, 20, 20), channels_first=True)
    first.load_state_dict(last.state_dict())
    shots = pictures()
    turned = first.encode(shots.permute(0, 3, 1, 2).contiguous())["pooled"]
    torch.testing.assert_close(last.encode(shots)["pooled"], turned)
    assert not torch.equal(turned, last.encode(shots.permute(0, 2, 1, 3))["pooled"])  # rows are not columns


def test_rows_do_not_mix_and_place_matters():
    field, shots = made(), pictures()
    whole = field.encode(shots)["pooled"]
    torch.testing.assert_close(field.encode(shots[2:3])["pooled"], whole[2:3])
    assert not torch.allclose(field.encode(shots.roll(7, 2))["pooled"], whole)  # no average over places


@pytest.mark.parametrize("frozen", [False, True])
def test_the_encoder_trains_unless_frozen(frozen):
    field = made(frozen=frozen)
    assert any(p.requires_grad for p in field.encoder_parameters()) is not frozen
    field(*inputs(), field.encode(pictures())).square().sum().backward()
    assert all((p.grad is None) is frozen for p in field.encoder.parameters())
    assert all(p.grad is not None for p in field.head.net.parameters())


def test_is_rebuilt_from_its_arguments():
    field = made(state_dim=2, frozen=True, average=True)
    other = PixelField(**field.args)
    other.load_state_dict(field.state_dict())
    obs, x = {"pixels": pictures(), "s": torch.ones(4, 2)}, inputs()
    assert torch.equal(field(*x, field.encode(obs)), other(*x, other.encode(obs)))
    assert other.uses_dt


def test_what_is_no_picture_is_refused():
    with pytest.raises(ValueError, match=r"square pictures, got 20 x 24"):
        made(pixels=(20, 24, 3))
    field = made()
    for wrong in (pictures().float(), pictures(side=21)):
        with pytest.raises(ValueError, match=r"uint8 \(N, \*\(20, 20, 3\)\), got"):
            field.encode(wrong)
