"""Few-step policies: a shipped DiT converts bit for bit, averages are learnt, and what holds the training together."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from rlflow.flow.grid import uniform_times
from rlflow.flow.matching import cfm_loss
from rlflow.models.io import load_field, save_field
from rlflow.models.mlp import MLPField
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
    more = {"drop": 0.0, "times": uniform_times, "autocast": False, "average": 0.99} | settings
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
@pytest.mark.parametrize("loss", [MeanFlow(), SplitMeanFlow(), AlphaFlow()], ids=lambda v: type(v).__name__)
def test_one_step_makes_the_mixture(loss):
    """Where one step of a matched velocity, the mean of the data for every noise, makes a point of it."""
    field = trained(loss, 2000)
    assert far(field, 1) < 0.12
    x, t = torch.linspace(-2, 2, 32)[:, None], torch.zeros(32)
    cond = field.encode(torch.ones(32, 1))
    half = x + 0.5 * field(x, t, t + 0.5, cond)
    composed = half + 0.5 * field(half, t + 0.5, t + 0.5, cond)
    assert float((composed - x - field(x, t, t + 1, cond)).abs().mean()) < 0.1


@pytest.mark.slow
def test_one_step_of_a_matched_velocity_does_not():
    def matched(field, *batch):
        return cfm_loss(partial(field), *batch)

    assert far(trained(matched, 500), 1) > 0.3
