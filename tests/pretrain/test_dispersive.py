"""Dispersive losses: least at a regular simplex, never mere inflation, and nothing but an addition to what is learnt."""

import argparse
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from rlflow.flow.matching import cfm_loss
from rlflow.models.mlp import MLPField
from rlflow.pretrain.average import MeanFlow, SplitMeanFlow
from rlflow.pretrain.cloning import Cloning
from rlflow.pretrain.dispersive import TAU, VARIANTS, Dispersive, infonce, shuffled
from rlflow.pretrain.few_steps import FEW_STEPS

LAYERS = ("net.1", "net.3")
N = 8
LEAST = {
    "mp1": math.log((1 + (N - 1) / math.e) / N),
    "infonce": -2 * N / (N - 1) / TAU,
    "cosine": -1 / (N - 1) / TAU,
    "hinge": 0.0,
}
"""Where all rows are equally far from all others, and their mean is 0."""


def features(scale: float = 1.0, offset: float = 0.0) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return (offset + scale * torch.randn(64, 32, generator=rng, dtype=torch.float64)).requires_grad_()


def simplex() -> Tensor:
    return (torch.eye(N) - 1 / N).double()


def term(name: str, h: Tensor) -> Tensor:
    return Dispersive(cfm_loss, LAYERS, VARIANTS[name]).term(h)


@pytest.mark.parametrize("name", LEAST)
def test_nothing_is_less_than_a_simplex(name):
    assert float(term(name, simplex())) == pytest.approx(LEAST[name], abs=1e-9)
    torch.manual_seed(0)
    for _ in range(20):
        assert float(term(name, torch.randn(N, 12, dtype=torch.float64))) > LEAST[name]


def test_covariance_is_nothing_where_features_vary_each_for_itself():
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).double()
    assert float(term("covariance", signs)) == 0
    assert float(term("covariance", signs[:, :1].expand(-1, 3))) > 1  # always together
    assert float(term("covariance", signs * torch.tensor([1.0, 1.0, 0.1]))) > 0.1  # one hardly varies


@pytest.mark.parametrize("offset", [0.0, 2.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_neither_nothing_nor_inflation(name, scale, offset):
    """Orthogonal to the features, whatever their scale; the same but for the scale."""
    h, one = features(scale, scale * offset), features(1.0, offset)
    found, at_one = (torch.autograd.grad(term(name, x), x)[0] for x in (h, one))
    assert abs(float(cosine_similarity(found.flatten(), h.detach().flatten(), dim=0))) < 1e-6
    assert float(scale * found.norm()) > 1e-3
    torch.testing.assert_close(scale * found, at_one)


def test_without_the_unit_it_would_be_inflation():
    h = features()
    (found,) = torch.autograd.grad(infonce(h), h)
    assert float(cosine_similarity(found.flatten(), h.detach().flatten(), dim=0)) < -0.8


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_that_were_nearly_alike_part(name):
    """The share of the variance that lies between rows grows from a twentieth."""
    h = features(0.2, 1.0)
    optimizer = torch.optim.Adam([h], lr=0.02)

    def apart() -> float:
        return float(h.var(0).sum() / h.square().mean(0).sum())

    before = apart()
    for _ in range(50):
        optimizer.zero_grad()
        term(name, h).backward()
        optimizer.step()
    assert apart() > 2 * before


def field() -> MLPField:
    torch.manual_seed(0)
    return MLPField(3, (2,), width=16, depth=2, average=True)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x_1, x_0 = torch.randn((2, 32, 2), generator=rng)
    return x_1, torch.randn(32, 3, generator=rng), x_0, torch.rand(32, generator=rng)


def losses(loss: object, net: MLPField) -> Tensor:
    x_1, obs, x_0, t = batch()
    return loss.at(0.5, net)(net, x_1, net.encode(obs), x_0, t)


@pytest.mark.parametrize("inner", [MeanFlow(), SplitMeanFlow()], ids=lambda v: type(v).__name__)
def test_weight_0_is_the_inner_loss_bit_for_bit(inner):
    one, two = field(), field()
    plain, with_term = losses(inner, one), losses(Dispersive(inner, LAYERS, weight=0.0), two)
    assert torch.equal(plain, with_term)
    plain.mean().backward()
    with_term.mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("inner", [MeanFlow(), SplitMeanFlow()], ids=lambda v: type(v).__name__)
def test_the_term_is_of_the_pass_that_learns_alone(inner):
    """Targets run through the same layers, with derivatives and without a gradient."""
    net, heard = field(), []
    net.net[1].register_forward_hook(lambda module, args, out: heard.append(out))
    plain, found = losses(inner, net), losses(Dispersive(inner, ("net.1",), weight=0.7), net)
    (learns,) = [h for h in heard[len(heard) // 2 :] if h.requires_grad]
    torch.testing.assert_close(found - plain, (0.7 * term("mp1", learns)).expand(32), rtol=1e-5, atol=1e-6)


def test_inference_runs_no_hooks():
    net = field()
    losses(Dispersive(MeanFlow(), LAYERS), net)
    assert not any(module._forward_hooks for module in net.modules())


def test_any_loss_can_be_inside():
    net, (x_1, obs, x_0, t) = field(), batch()
    found = Dispersive(cfm_loss, LAYERS).at(0.0, net)(net, x_1, net.encode(obs), x_0, t)
    assert bool((found < cfm_loss(net, x_1, net.encode(obs), x_0, t)).all())


def test_the_control_keeps_what_a_feature_was_and_not_what_a_row_was():
    h = features().detach()
    mixed = shuffled(h)
    assert torch.equal(mixed.sort(0).values, h.sort(0).values)
    assert not bool((mixed == h).all(1).any())


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"MLPField has no layers \['net.9'\]; it has \['net', 'net.0'"):
        losses(Dispersive(MeanFlow(), ("net.1", "net.9")), field())
    with pytest.raises(ValueError, match="needs layers and weight >= 0"):
        Dispersive(MeanFlow(), ())


@pytest.mark.parametrize(
    ("options", "weight", "drop", "command"),
    [
        ([], None, 0.0, " --averages split"),
        (["--averages", "mean", "--dispersive", "mp1"], 0.5, 0.0, " --averages mean --dispersive mp1 --weight 0.5 "),
        (["--dispersive", "cosine", "--weight", "2", "--shuffle"], 2.0, 0.0, "--layers net.1 net.3 net.5 --shuffle"),
        (["--guidance", "2"], None, 0.1, " --averages split --guidance 2"),
        (["--guidance", "2", "--released"], None, 0.0, " --guidance 2 --released"),
    ],
)
def test_options_choose_the_loss_and_the_command_repeats_them(options, weight, drop, command, monkeypatch, tmp_path):
    cloning, made = FEW_STEPS["robot_bc_hopper_meanflow"], []
    monkeypatch.setattr("rlflow.pretrain.cloning.Cloning.make", lambda self, out, args: made.append(self) or {})
    args = parsed(cloning, options)
    cloning.make(tmp_path, args)
    loss = made[0].loss
    assert (loss.weight if isinstance(loss, Dispersive) else None) == weight
    assert made[0].drop == drop
    assert command in cloning.options(args)
    inner = loss.inner if isinstance(loss, Dispersive) else loss
    assert (inner.guidance is not None) == ("--guidance" in options)


def parsed(cloning: Cloning, options: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cloning.add_options(parser)
    return parser.parse_args(options)


@pytest.mark.parametrize("option", ["--released", "--shuffle"])
def test_options_of_what_is_not_asked_for_are_refused(option, tmp_path):
    cloning = FEW_STEPS["robot_bc_metaworld_meanflow"]
    with pytest.raises(ValueError, match=f"{option} is"):
        cloning.make(tmp_path, parsed(cloning, [option]))
