"""Velocity fields of off-policy actors: the gate, the decoder, the Gaussian."""

import pytest
import torch

from rlflow.flow.kernels import LearnedNoise
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import All
from rlflow.models.decoder import DecoderField
from rlflow.models.gated import GatedField
from rlflow.models.gaussian import GaussianField
from rlflow.models.io import load_field, save_field

FIELDS = {"gated": GatedField, "decoder": DecoderField, "gaussian": GaussianField}
SIZES = {"gated": {"width": 16}, "decoder": {"width": 16, "heads": 2}, "gaussian": {"width": 16}}


def make(name, chunk=2, **more):
    torch.manual_seed(0)
    return FIELDS[name](5, (chunk, 3), **(SIZES[name] | more)).double()


def inputs(num=6, chunk=2):
    return torch.randn(num, chunk, 3).double(), torch.rand(num).double(), torch.randn(num, 5).double()


@pytest.mark.parametrize("name", FIELDS)
def test_a_row_does_not_depend_on_the_others(name):
    field, (x, t, obs) = make(name), inputs()
    both = field(x, t, 0 * t, field.encode(obs))
    alone = torch.cat([field(x[i, None], t[i, None], 0 * t[i, None], field.encode(obs[i, None])) for i in range(6)])
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize("name", FIELDS)
def test_every_number_observed_and_every_weight_counts(name):
    field, (x, t, obs) = make(name), inputs()
    for p in field.parameters():
        torch.nn.init.normal_(p, std=0.3)
    obs.requires_grad_()
    field(x, t, 0 * t, field.encode(obs)).square().sum().backward()
    assert (obs.grad.abs().sum(0) > 0).all()
    assert all((p.grad != 0).any() for p in field.parameters())


@pytest.mark.parametrize("name", FIELDS)
def test_it_is_rebuilt_from_its_checkpoint(name, tmp_path):
    field, (x, t, obs) = make(name, running=True).float(), inputs()
    field.observe(obs)
    again = load_field(str(save_field(field, tmp_path / "field")))
    x, t, obs = (v.float() for v in (x, t, obs))
    assert torch.equal(field(x, t, t, field.encode(obs)), again(x, t, t, again.encode(obs)))


# -- Flow-G ---------------------------------------------------------------------------------------


def test_a_gated_step_is_an_average_of_where_it_is_and_of_the_candidate():
    """So however many steps there are, no entry leaves the range of x_0 and the candidates."""
    field, (x, t, obs) = make("gated"), inputs()
    torch.nn.init.normal_(field.gate[-1].weight, std=3.0)
    cond = field.encode(obs)
    candidate = field.candidate(x, t, 0 * t, cond)
    for dt in (0.25, 1.0):
        moved = x + dt * field(x, t, 0 * t, cond)
        assert (moved >= torch.minimum(x, candidate) - 1e-12).all()
        assert (moved <= torch.maximum(x, candidate) + 1e-12).all()


def test_the_gate_starts_open_for_everyone():
    field, (x, t, obs) = make("gated"), inputs()
    cond = field.encode(obs)
    opened = field(x, t, 0 * t, cond) / (field.candidate(x, t, 0 * t, cond) - x)
    torch.testing.assert_close(opened, torch.full_like(opened, torch.sigmoid(torch.tensor(5.0)).item()))


def test_gradients_do_not_grow_over_gated_steps():
    """With candidates that do not read x the Jacobian of K steps is (1 - z / K)^K, whatever the candidate's size."""
    field, (x, t, obs) = make("gated"), inputs()
    first = field.candidate.net[0]
    with torch.no_grad():
        first.weight[:, :6] = 0
        field.candidate.net[-1].weight.mul_(100)
    cond, start = field.encode(obs), x.requires_grad_()
    for k in range(8):
        x = x + field(x, torch.full_like(t, k / 8), 0 * t, cond) / 8
    (gradient,) = torch.autograd.grad(x.sum(), start)
    z = torch.sigmoid(torch.tensor(5.0)).double()
    torch.testing.assert_close(gradient, torch.full_like(gradient, float((1 - z / 8) ** 8)))


# -- Flow-T ---------------------------------------------------------------------------------------


def test_attention_chooses_among_the_observations():
    """Tokens that are exchanged together with their place change nothing: it is a set that is attended to."""
    field, (x, t, obs) = make("decoder"), inputs()
    before = field(x, t, 0 * t, field.encode(obs))
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for p in (field.token, field.place):
            p.copy_(p[order])
    torch.testing.assert_close(field(x, t, 0 * t, field.encode(obs[:, order])), before)
    assert not torch.allclose(field(x, t, 0 * t, field.encode(obs)), before)


def test_keys_and_values_are_made_once_per_observation():
    field, obs = make("decoder"), inputs()[2]
    policy = FlowPolicy(field, LearnedNoise(5, (2, 3)).double(), num_steps=4)
    made = []
    field.keys_values.register_forward_hook(lambda *_: made.append(1))
    policy.sample(policy.encode(obs), All()(0, policy.grid(4), torch.zeros(1, dtype=torch.long)))
    assert len(made) == 1
    assert policy.encoder_trains


def test_actions_of_a_chunk_see_each_other():
    field, (x, t, obs) = make("decoder"), inputs()
    other = x.clone()
    other[:, 1] += 1
    cond = field.encode(obs)
    assert (field(x, t, 0 * t, cond)[:, 0] != field(other, t, 0 * t, cond)[:, 0]).any()


def test_one_number_is_nothing_to_attend_to():
    with pytest.raises(ValueError, match="use field=gated"):
        DecoderField(1, (1, 2))
    with pytest.raises(ValueError, match="heads must divide the width"):
        DecoderField(3, (1, 2), width=10, heads=4)


# -- the Gaussian ---------------------------------------------------------------------------------


def test_one_step_of_the_gaussian_field_forgets_where_it_began():
    field, (x, t, obs) = make("gaussian"), inputs()
    cond, zero = field.encode(obs), 0 * t
    torch.testing.assert_close(x + field(x, zero, zero, cond), field.mean(cond["pooled"]).reshape(x.shape))
    half = x + 0.5 * field(x, zero, zero, cond)
    torch.testing.assert_close(half + 0.5 * field(half, zero + 0.5, zero, cond), field.mean(obs).reshape(x.shape))
