"""A policy that is told a return: what is hidden, and what guidance does to Gaussians."""

import pytest
import torch

from rlflow.flow.guidance import CFG
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.matching import cfm_loss
from rlflow.flow.policy import FlowPolicy
from rlflow.models.goals.returns import ReturnField
from rlflow.models.io import load_field, save_field
from rlflow.pretrain.matching import drop_condition
from rlflow.types import Cond


def made(event: tuple[int, ...] = (2, 1)) -> ReturnField:
    torch.manual_seed(0)
    field = ReturnField(4, event, width=16, depth=2)
    field.fit_normalizer(
        torch.stack([torch.full((3,), 10.0), torch.ones(3), torch.full((3,), 40.0)]), 50 * torch.randn(99)
    )
    return field


def seen(num: int = 6) -> dict[str, torch.Tensor]:
    return {"obs": torch.randn(num, 3), "target": 100 * torch.randn(num, 1)}


def test_null_hides_the_target_alone() -> None:
    field, obs = made(), seen()
    cond, other = field.encode(obs), field.encode({**obs, "target": obs["target"] + 70})
    null = field.null(cond)
    assert torch.equal(null["pooled"][:, :3], cond["pooled"][:, :3])
    assert not null["pooled"][:, 3:].any()
    assert torch.equal(null["pooled"], field.null(other)["pooled"])
    average = field.encode({**obs, "target": torch.full((6, 1), float(field.normalizer.moments[1, 3]))})
    assert not torch.allclose(average["pooled"], null["pooled"])  # an average target is a target


def test_a_dropped_row_keeps_its_observation() -> None:
    field = made()
    cond = field.encode(seen(400))
    mixed = drop_condition(field, cond, 0.25, torch.Generator().manual_seed(0))
    gone = mixed["pooled"][:, -1] == 0
    assert 0.18 < float(gone.float().mean()) < 0.32
    assert torch.equal(mixed["pooled"][:, :3], cond["pooled"][:, :3])
    assert torch.equal(drop_condition(field, cond, 1.0, torch.Generator())["pooled"], field.null(cond)["pooled"])


def test_guidance_of_one_is_the_conditional_velocity_and_of_nothing_the_unconditional() -> None:
    field, x, t = made(), torch.randn(6, 2, 1), torch.rand(6)
    cond = field.encode(seen())
    for scale, expected in ((1.0, cond), (0.0, field.null(cond))):
        torch.testing.assert_close(CFG(field, scale)(x, t, 0 * t, cond), field(x, t, 0 * t, expected))


def test_an_observation_without_a_target_is_refused() -> None:
    for obs in (torch.randn(2, 3), {"obs": torch.randn(2, 3)}):
        with pytest.raises(ValueError, match=r"no target is told: set env\.targets"):
            made().encode(obs)


def test_is_saved_whole(tmp_path) -> None:
    field, obs = made(), seen()
    save_field(field, tmp_path / "field")
    again = load_field(str(tmp_path / "field"))
    assert torch.equal(again.encode(obs)["pooled"], field.encode(obs)["pooled"])


class Exact(ReturnField):
    """Data N(m, s^2) in one dimension: m and s of the row, told or hidden."""

    table = torch.tensor([[0.2, 0.5], [1.0, 0.5]])

    def null(self, cond: Cond) -> Cond:
        return Cond({"pooled": self.table[0].expand(len(cond), 2)})

    def forward(self, x, t, dt, cond):
        mean, std = (v[:, None, None] for v in cond["pooled"].T)
        t = t[:, None, None]
        var = t.square() * std.square() + (1 - t).square()
        return mean + (t * std.square() - (1 - t)) / var * (x - t * mean)


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_guided_gaussians_of_equal_spread_move_by_w(scale: float) -> None:
    """N(m0 + w (mR - m0), s^2), exactly as K grows: guidance extrapolates along what the target changes."""
    field = Exact(2, (1, 1))
    policy = FlowPolicy(CFG(field, scale), FlowSDE(), num_steps=200)
    with torch.no_grad():
        x = policy.sample(Cond({"pooled": Exact.table[1].expand(4000, 2)})).final
    assert float(x.mean()) == pytest.approx(0.2 + scale * 0.8, abs=0.03)
    assert float(x.std()) == pytest.approx(0.5, rel=0.04)


def test_with_everything_dropped_only_the_unconditional_law_is_learnt() -> None:
    """The gradient of a fully dropped batch does not depend on the targets."""
    field, obs = made(), seen()
    grads = []
    for shift in (0.0, 500.0):
        cond = field.encode({**obs, "target": obs["target"] + shift})
        dropped = drop_condition(field, cond, 1.0, torch.Generator().manual_seed(0))
        x = torch.ones(6, 2, 1)
        loss = cfm_loss(field, x, dropped, 0 * x, torch.full((6,), 0.3)).mean()
        grads.append(torch.autograd.grad(loss, next(field.net.parameters()))[0])
    assert torch.equal(*grads)
