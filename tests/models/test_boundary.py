"""Boundary RF: right at t = 1 whatever the network says, a score without a pole, and otherwise the network."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlflow.flow import path
from rlflow.flow.guidance import CFG
from rlflow.models.boundary import Boundary, boundary
from rlflow.models.dit import DiT
from rlflow.models.io import load_field, save_field
from rlflow.models.mlp import MLPField
from rlflow.report.metrics_file import read_metrics
from rlflow.types import Cond

POWERS = [1.0, 4.0, 8.0]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


class Off(MLPField):
    """The velocity of data at one point mu, off by a constant."""

    def __init__(self, error: float = 0.3, mu: float = 1.5):
        super().__init__(4, (3,), width=8)
        self.error, self.mu = error, mu

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        return torch.full_like(x, self.mu) + self.error


def at(field, t: float, num: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and the velocity there."""
    torch.manual_seed(1)
    x, times = torch.randn(num, 3), torch.full((num,), t)
    return x, times, field(x, times, torch.zeros(num), field.encode(torch.randn(num, 4)))


@pytest.mark.parametrize("power", POWERS)
def test_at_the_data_the_velocity_is_the_sample(power: float) -> None:
    """And so is the sample it predicts; at the noise it is the network's."""
    inner = MLPField(4, (3,), width=8)
    x, t, v = at(Boundary(inner, power), 1.0)
    assert torch.equal(v, x)
    assert torch.equal(x + (1 - t[:, None]) * v, x)
    assert torch.equal(at(Boundary(inner, power), 0.0)[2], at(inner, 0.0)[2])


@pytest.mark.parametrize("power", POWERS)
def test_the_score_near_the_data_is_bounded_and_has_its_limit(power: float) -> None:
    """p f - (p + 1) x; of the bare network it grows like 1 / (1 - t)."""
    inner = Off()
    for t in (0.999, 1 - 1e-6):
        x, times, v = at(Boundary(inner, power), t)
        score = path.score(x, v, times[:, None])
        assert float(score.abs().max()) < 1.01 * (power * 1.8 + (power + 1) * float(x.abs().max()))
        limit = power * (inner.mu + inner.error) - (power + 1) * x
        torch.testing.assert_close(score, limit, rtol=0, atol=40 * power**2 * (1 - t))
        x, times, v = at(inner, t)
        assert float(path.score(x, v, times[:, None]).abs().max()) > 0.1 / (1 - t)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9, 0.999])
def test_an_error_of_the_network_moves_the_score_by_at_most_power_times_it(power: float, t: float) -> None:
    """t (1 - t^p) / (1 - t) e in place of t / (1 - t) e."""
    x, times, wrong = at(Boundary(Off(0.3), power), t)
    right = at(Boundary(Off(0.0), power), t)[2]
    gap = path.score(x, wrong, times[:, None]) - path.score(x, right, times[:, None])
    torch.testing.assert_close(gap, torch.full_like(gap, 0.3 * t * (1 - t**power) / (1 - t)), rtol=1e-9, atol=1e-9)
    assert float(gap.abs().max()) <= 0.3 * power + 1e-9


def test_the_rest_is_the_inner_field(scenes_field: str) -> None:
    torch.set_default_dtype(torch.float32)
    inner = load_field(scenes_field)
    field = Boundary(inner)
    text = ["one red circle", "two blue squares"]
    a, b = (f.encode(f.tokenize(text)) for f in (inner, field))
    assert all(torch.equal(a[name], b[name]) for name in a.data)
    assert field.event_shape == inner.event_shape
    assert len(field.encoder_parameters()) == len(inner.encoder_parameters())
    field.grad_checkpointing = True
    assert inner.grad_checkpointing
    guided = CFG(field, 2.0)
    assert guided.unguided is field
    assert guided.calls == 2
    loss = field(torch.randn(2, *field.event_shape), torch.tensor([0.3, 0.99]), torch.zeros(2), b).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in inner.named_parameters() if "patch_out" in n)


def test_what_it_does_not_hold_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not for MLPField: .* knows no averages"):
        Boundary(MLPField(4, (3,), width=8, average=True))
    with pytest.raises(ValueError, match="inside of guidance"):
        Boundary(CFG(DiT(["red"], size=8, patch=4, width=16, depth=1, heads=2), 2.0))


def test_is_a_model_that_a_recipe_names_and_a_folder_keeps(scenes_field: str, tmp_path: Path, trainer) -> None:
    """Saved with its weights, and with a first log-ratio of exactly 0."""
    torch.set_default_dtype(torch.float32)
    field = boundary(scenes_field, 3.0)
    with torch.no_grad():
        field.field.patch_out.bias += 1.0
    again = load_field(str(save_field(field, tmp_path / "mine")))
    assert isinstance(again, Boundary)
    assert again.power == 3.0
    assert torch.equal(again.field.patch_out.bias, field.field.patch_out.bias)
    named = f"policy.field={{name: boundary, checkpoint: {scenes_field}}}"
    trainer(tmp_path / "run", named, "train.iterations=1").fit()
    (row,) = (row for row in read_metrics(tmp_path / "run") if row["kind"] == "train")
    assert row["policy/first_log_ratio_max"] == 0
    assert isinstance(load_field(str(tmp_path / "run/model")), Boundary)
