"""Few-step policies: a shipped DiT converts bit for bit, averages are learnt, and what holds the training together."""

import json
import math
from dataclasses import replace

import pytest
import torch

from rlflow.flow.grid import uniform_times
from rlflow.flow.matching import cfm_loss
from rlflow.models.io import load_field, save_field
from rlflow.models.mlp import MLPField, TimeFeatures
from rlflow.pretrain.average import AlphaFlow, MeanFlow, SplitMeanFlow
from rlflow.pretrain.few_steps import SHAPES, converted
from rlflow.pretrain.matching import pretrain
from rlflow.pretrain.worlds import main
from rlflow.types import Cond

MEANS, STDS = torch.tensor([[-1.0, 1.5], [0.3, 0.5]])


@pytest.mark.parametrize("name", ["shapes", "words"])
def test_a_shipped_dit_converts_and_is_the_same_at_dt_0(name):
    field, made = load_field(name).requires_grad_(False), converted(name).requires_grad_(False)
    x, t = torch.randn(2, *field.event_shape), torch.tensor([0.0, 0.6])
    cond = field.null(Cond({"pooled": torch.zeros(2, 1)}))
    assert torch.equal(field(x, t, 0 * t, cond), made(x, t, 0 * t, cond))
    assert not torch.equal(made(x, t, 0 * t, cond), made(x, t, 0 * t + 0.2, cond))


def test_what_cannot_be_converted_is_refused(tmp_path):
    save_field(converted("shapes"), tmp_path / "already")
    for name in ("hopper", str(tmp_path / "already")):
        with pytest.raises(ValueError, match=f"--from: {name} is no DiT of instantaneous velocities"):
            converted(name)


def test_the_command_converts_and_tells_what_it_is_worth(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "rlflow.pretrain.few_steps.judge_scenes", lambda field, num_steps: {"heldout_strict": num_steps}
    )
    main(replace(SHAPES, rows=2), ["--from", "shapes", "--steps", "1", "--out", str(tmp_path / "made")])
    made_by = json.loads((tmp_path / "made/config.json").read_text())["made_by"]
    assert made_by["command"] == "rlflow pretrain shapes_fewstep --from shapes --steps 1 --seed 0"
    assert [made_by[f"heldout_strict_k{k}"] for k in (1, 2, 4)] == [1, 2, 4]
    assert load_field(str(tmp_path / "made")).uses_dt


def modes(rows: int = 256):
    """Endless batches of a broad mixture of two modes."""
    rng = torch.Generator().manual_seed(0)
    while True:
        mode = (torch.rand(rows, generator=rng) < 0.6).long()
        x = MEANS[mode] + STDS[mode] * torch.randn(rows, generator=rng)
        yield x[:, None], torch.ones(rows, 1)


def trained(loss, steps, **settings) -> MLPField:
    torch.manual_seed(0)
    field = MLPField(1, (1,), width=64, depth=2, average=True)
    more = {"lr": 1e-3, "drop": 0.0, "times": uniform_times, "autocast": False, "average": 0.99} | settings
    return pretrain(field, modes(), steps=steps, loss=loss, **more).requires_grad_(False)


def far(field: MLPField, num_steps: int) -> float:
    """W1 between what steps of 1 / K make of noise and the data."""
    num = 4000
    data = torch.cat([x for x, _ in (b for b, _ in zip(modes(), range(16), strict=False))])[:num, 0]
    x = torch.randn(num, 1, generator=torch.Generator().manual_seed(1))
    cond = field.encode(torch.ones(num, 1))
    for k in range(num_steps):
        t = torch.full((num,), k / num_steps)
        x = x + field(x, t, torch.full_like(t, 1 / num_steps), cond) / num_steps
    return (x[:, 0].sort().values - data.sort().values).abs().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("loss", [SplitMeanFlow(), AlphaFlow()], ids=lambda v: type(v).__name__)
def test_one_step_makes_the_mixture(loss):
    """And the way to the middle and from there on is that of one step."""
    field = trained(loss, 2000)
    assert far(field, 1) < 0.4
    x, t = torch.linspace(-2, 2, 32)[:, None], torch.zeros(32)
    cond = field.encode(torch.ones(32, 1))
    half = x + 0.5 * field(x, t, t + 0.5, cond)
    composed = half + 0.5 * field(half, t + 0.5, t + 0.5, cond)
    assert float((composed - x - field(x, t, t + 1, cond)).abs().mean()) < 0.5


@pytest.mark.slow
def test_one_step_of_a_matched_velocity_does_not():
    """It leads every noise towards the mean of the data, whose standard deviation is 1.3."""
    field = trained(cfm_loss, 1000)
    x, t = torch.randn(4000, 1), torch.zeros(4000)
    assert float((x + field(x, t, t, field.encode(torch.ones(4000, 1)))).std()) < 0.8


class Lagging(MeanFlow):
    """With the derivative of the averaged weights."""

    lagging = True


@pytest.mark.slow
def test_a_derivative_is_learnt_from_live_weights_alone(monkeypatch):
    """With slow time features, which keep the derivative small."""
    frequencies = math.pi * 2.0 ** torch.linspace(0, 1, 8)
    monkeypatch.setattr(TimeFeatures, "forward", lambda _, t: angles(t[:, None] * frequencies))
    assert far(trained(MeanFlow(), 1000), 1) < 0.5
    assert far(trained(Lagging(), 1000), 1) > 2


def angles(phase: torch.Tensor) -> torch.Tensor:
    return torch.cat([phase.sin(), phase.cos()], -1)
