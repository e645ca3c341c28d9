"""Guidance wraps the field: linear in the scale, one network call, and invisible to the rest of the package."""

import pytest
import torch
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.flow.guidance import CFG, CFGNorm, CFGZero
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.models.mlp import MLPField
from rlflow.types import Cond

WRAPPERS = [CFG, CFGNorm, CFGZero]


class Recorded(MLPField):
    """An MLPField that keeps the number of rows of each call."""

    def __init__(self):
        super().__init__(3, (2, 4), width=16)
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        self.rows.append(len(x))
        return super().forward(x, t, dt, cond)


@pytest.fixture
def field() -> Recorded:
    return Recorded().double().requires_grad_(False)


@pytest.fixture
def inputs(field: Recorded) -> tuple[Tensor, Tensor, Tensor, Cond]:
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    t = torch.tensor([0.0, 0.02, 0.05, 0.3, 0.6, 0.9], dtype=torch.float64)
    return x, t, torch.zeros_like(t), field.encode(torch.randn(6, 3))


def branches(field: VelocityField, inputs: tuple[Tensor, Tensor, Tensor, Cond]) -> tuple[Tensor, Tensor]:
    x, t, dt, cond = inputs
    return field(x, t, dt, cond), field(x, t, dt, field.null(cond))


def rows_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_branches_differ(field, inputs):
    v_cond, v_null = branches(field, inputs)
    assert float((v_cond - v_null).abs().max()) > 1e-2


def test_scale_1_is_the_conditional_velocity(field, inputs):
    v_cond, _ = branches(field, inputs)
    close(CFG(field, 1.0)(*inputs), v_cond)
    close(CFGZero(field, 1.0, zero_until=0.0)(*inputs), v_cond)


def test_scale_0_is_the_unconditional_velocity(field, inputs):
    close(CFG(field, 0.0)(*inputs), branches(field, inputs)[1])


def test_cfg_is_linear_in_the_scale(field, inputs):
    v_cond, v_null = branches(field, inputs)
    for scale in (0.5, 3.0, 4.5):
        close(CFG(field, scale)(*inputs), scale * v_cond + (1 - scale) * v_null)


class TestCFGNorm:
    def test_keeps_the_length_of_the_conditional_velocity_and_the_direction_of_cfg(self, field, inputs):
        v_cond, _ = branches(field, inputs)
        plain, kept = CFG(field, 3.0)(*inputs), CFGNorm(field, 3.0)(*inputs)
        close(kept.flatten(1).norm(dim=1), v_cond.flatten(1).norm(dim=1))
        close(kept * plain.flatten(1).norm(dim=1)[:, None, None], plain * v_cond.flatten(1).norm(dim=1)[:, None, None])

    def test_a_cap_shortens_what_is_longer_and_nothing_else(self, field, inputs):
        v_cond, _ = branches(field, inputs)
        plain, limit = CFG(field, 3.0)(*inputs), 1.1 * v_cond.flatten(1).norm(dim=1)
        longer = plain.flatten(1).norm(dim=1) > limit
        assert 0 < int(longer.sum()) < 6
        capped = CFGNorm(field, 3.0, cap=1.1)(*inputs)
        close(capped[~longer], plain[~longer])
        close(capped[longer].flatten(1).norm(dim=1), limit[longer])

    def test_the_model_says_over_what(self, field, inputs, monkeypatch):
        """Of each row of an event, as of a token."""
        monkeypatch.setattr(field, "lengths", lambda v: v.norm(dim=-1, keepdim=True))
        v_cond, _ = branches(field, inputs)
        close(CFGNorm(field, 3.0)(*inputs).norm(dim=-1), v_cond.norm(dim=-1))


class TestCFGZero:
    def test_the_unconditional_part_is_the_projection_on_its_direction(self, field, inputs):
        """At scale 0 what is left is s v_u, and v_c - s v_u is orthogonal to v_u in each row."""
        v_cond, v_null = branches(field, inputs)
        projected = CFGZero(field, 0.0, zero_until=0.0)(*inputs)
        close(rows_dot(v_cond - projected, v_null), torch.zeros(6, 1, 1, dtype=torch.float64))
        close(projected * rows_dot(v_null, v_null), v_null * rows_dot(projected, v_null))

    def test_both_places_use_the_projection(self, field, inputs):
        v_cond, v_null = branches(field, inputs)
        s = rows_dot(v_cond, v_null) / rows_dot(v_null, v_null)
        close(CFGZero(field, 3.0, zero_until=0.0)(*inputs), s * v_null + 3.0 * (v_cond - s * v_null))

    def test_does_not_see_the_size_of_the_unconditional_velocity(self, field):
        v_cond, v_null = torch.randn(2, 6, 2, 4, dtype=torch.float64).unbind(0)
        guided = CFGZero(field, 3.0, zero_until=0.0)
        t = torch.full((6,), 0.5)
        close(guided.combine(v_cond, v_null, t), guided.combine(v_cond, 7 * v_null, t))

    def test_is_zero_before_zero_until_and_only_there(self, field, inputs):
        v = CFGZero(field, 3.0, zero_until=0.04)(*inputs)
        assert v.flatten(1).any(1).tolist() == [False, False, True, True, True, True]
        close(v[2:], CFGZero(field, 3.0, zero_until=0.0)(*inputs)[2:])

    def test_a_vanishing_unconditional_velocity_is_finite(self, field):
        v_cond, zero = torch.randn(6, 2, 4), torch.zeros(6, 2, 4)
        v = CFGZero(field, 3.0, zero_until=0.0).combine(v_cond, zero, torch.full((6,), 0.5))
        torch.testing.assert_close(v, 3.0 * v_cond)

    def test_rows_do_not_mix(self, field, inputs):
        whole = CFGZero(field, 3.0)(*inputs)
        x, t, dt, cond = inputs
        rows = torch.tensor([4, 1])
        close(CFGZero(field, 3.0)(x[rows], t[rows], dt[rows], cond.index(rows)), whole[rows])


@pytest.mark.parametrize("wrapper", WRAPPERS)
class TestWrapper:
    def test_one_network_call_with_both_branches(self, wrapper, field, inputs):
        wrapper(field, 3.0)(*inputs)
        assert field.rows == [12]

    def test_policy_counts_both_branches(self, wrapper, field, inputs):
        policy = FlowPolicy(wrapper(field, 3.0), FlowSDE(), num_steps=5)
        policy.sample(inputs[3].index(torch.arange(16) % 6))  # a multiple of 16: nothing is filled up
        assert policy.network_rows == 5 * 32 == sum(field.rows)
        assert wrapper(wrapper(field, 3.0), 2.0).calls == 4

    def test_a_detached_branch_is_the_same_velocity_in_a_call_without_a_graph(self, wrapper, inputs):
        """Value as ever; the gradient is that of the conditional branch times its factor, and one backward pass."""
        field = Recorded().double()
        x, t, dt, cond = inputs
        both, detached = wrapper(field, 3.0), wrapper(field, 3.0, detach=True)
        assert (both.graph_calls, detached.calls, detached.graph_calls) == (2, 2, 1)
        field.rows.clear()
        close(detached(x, t, dt, cond), both(x, t, dt, cond))
        assert field.rows == [6, 6, 12]
        policy = FlowPolicy(detached, FlowSDE(0.7))
        policy.velocity(x, t, dt, cond)
        assert (policy.network_rows, policy.graph_rows) == (12, 6)
        if wrapper is CFG:
            detached(x, t, dt, cond).sum().backward()
            found = [p.grad.clone() for p in field.parameters() if p.grad is not None]
            field.zero_grad()
            (3.0 * field(x, t, dt, cond)).sum().backward()
            for mine, expected in zip(found, [p.grad for p in field.parameters() if p.grad is not None], strict=True):
                close(mine, expected)

    def test_repeated_conditions_cost_nothing_until_they_are_read(self, wrapper, field, inputs):
        x, t, dt, cond = inputs
        x, t, dt = (z.repeat_interleave(2, 0) for z in (x, t, dt))
        lazy = wrapper(field, 3.0)(x, t, dt, cond.repeat(2))
        close(lazy[::2], wrapper(field, 3.0)(*inputs))

    def test_unguided_is_the_inner_field(self, wrapper, field):
        assert wrapper(field, 3.0).unguided is field
        assert field.unguided is field

    def test_shows_the_inner_field_to_everybody_else(self, wrapper, field):
        guided, obs = wrapper(field, 3.0), torch.randn(4, 3)
        assert guided.event_shape == field.event_shape
        assert guided.num_features == field.num_features
        assert (guided.uses_dt, guided.has_instantaneous) == (field.uses_dt, field.has_instantaneous)
        assert torch.equal(guided.encode(obs)["pooled"], field.encode(obs)["pooled"])
        assert torch.equal(guided.decode(obs), field.decode(obs))
        assert guided.encoder_parameters() == field.encoder_parameters()
        assert len(list(guided.parameters())) == len(list(field.parameters()))

    def test_half_precision_branches_are_combined_in_float32(self, wrapper, field):
        """The scale multiplies the rounding of the difference: 4.5 in bf16 would cost three times as much again."""
        v = [z.bfloat16() for z in torch.randn(2, 6, 2, 4).unbind(0)]

        class Fixed(Recorded):
            def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
                return torch.cat(v)

        cond = field.encode(torch.randn(6, 3))
        t = torch.full((6,), 0.5)
        out = wrapper(Fixed(), 4.5)(torch.zeros(6, 2, 4), t, t, cond)
        exact = wrapper(field, 4.5).combine(v[0].double(), v[1].double(), t)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)

    def test_a_field_without_a_null_condition_says_so(self, wrapper, inputs):
        class Plain(VelocityField):
            event_shape, num_features = (2, 4), 3

        with pytest.raises(NotImplementedError, match="guidance scale 1"):
            wrapper(Plain(), 3.0)(*inputs)
