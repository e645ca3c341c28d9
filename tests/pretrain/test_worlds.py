"""Pre-training: learns, is a function of seed and steps, drops captions, averages weights; the shipped checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rlflow
from rlflow.envs.captions import scenes
from rlflow.models.dit import DiT
from rlflow.models.io import save_field
from rlflow.pretrain.images import IMAGES, World
from rlflow.pretrain.matching import drop_condition, learning_rate_factor, pretrain, update_average
from rlflow.pretrain.worlds import WORLDS, main

ASSETS = Path(rlflow.__file__).parent / "assets"


def tiny() -> DiT:
    torch.manual_seed(0)
    field = DiT(scenes.VOCAB, size=8, patch=4, width=16, depth=1, heads=2)
    torch.nn.init.normal_(field.patch_out.weight, std=0.1)  # zero would stop all gradients at the first step
    return field


def batches(field: DiT, rows: int = 16):
    """Plain pictures whose brightness the caption names."""
    rng = torch.Generator().manual_seed(0)
    ids = field.tokenize(["one white circle", "one blue circle"])
    while True:
        bright = torch.randint(2, (rows,), generator=rng)
        yield (1.0 - 2.0 * bright)[:, None, None, None].expand(rows, 3, 8, 8).contiguous(), ids[bright]


def train(steps: int, seed: int = 0, **changes: object) -> tuple[DiT, list[float]]:
    field, losses = tiny(), []
    settings = {"hidden": field.hidden_matrices(), "progress": lambda _, loss, __: losses.append(loss)} | changes
    return pretrain(field, batches(field), steps=steps, seed=seed, **settings), losses


def test_loss_falls_and_the_caption_is_obeyed():
    averaged, losses = train(120)
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])
    t = torch.full((2,), 0.3)
    cond = averaged.encode(["one white circle", "one blue circle"])
    v = averaged(torch.zeros(2, 3, 8, 8), t, 0 * t, cond).mean((1, 2, 3))
    assert v[0] > 0.5
    assert v[1] < -0.5


def test_result_is_a_function_of_seed_and_steps():
    (first, _), (again, _), (other, _) = train(5), train(5), train(5, seed=1)
    pairs = zip(first.parameters(), again.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, c in zip(first.parameters(), other.parameters(), strict=True))


def test_muon_trains_the_hidden_matrices_and_adamw_the_rest():
    """Either learning rate at zero freezes its own half only."""
    start = dict(tiny().named_parameters())
    field = tiny()
    hidden = {name for name, p in field.named_parameters() if any(p is h for h in field.hidden_matrices())}
    assert hidden == {f"blocks.0.{name}.weight" for name in ("qkv", "attend", "up", "down")}
    for frozen, half in (({"muon_lr": 0.0}, hidden), ({"lr": 0.0}, set(start) - hidden)):
        moved = {name for name, p in train(3, **frozen)[0].named_parameters() if not torch.equal(p, start[name])}
        assert not moved & half
        assert moved


def test_share_of_dropped_captions():
    field = tiny()
    cond = field.encode(["one white circle"]).repeat(2000)
    null = field.null(cond)
    dropped = drop_condition(field, cond, 0.1, torch.Generator().manual_seed(0))
    gone = (dropped["pooled"] == null["pooled"]).all(1)
    assert gone.float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert (dropped["tokens"] == null["tokens"]).flatten(1).all(1).equal(gone)
    assert torch.equal(dropped["tokens"][~gone], cond["tokens"][~gone])
    assert drop_condition(field, cond, 0.0, torch.Generator()) is cond


def test_learning_rate_warms_up_stays_and_decays():
    factors = [learning_rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 30)
    assert factors[29:600] == [1.0] * 571
    assert factors[800] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0.02)


def test_average_moves_by_its_share():
    averaged, live = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * averaged.weight + 0.1 * live.weight
    update_average(averaged, live, 0.9)
    torch.testing.assert_close(averaged.weight, expected)


@pytest.mark.parametrize("name", IMAGES)
def test_batches_are_latents_with_training_captions(name):
    world = IMAGES[name]
    field = DiT(world.vocab, width=16, depth=1, heads=2)
    data, ids = next(world.batches(field, np.random.default_rng(0), 4))
    assert data.shape == (4, *field.event_shape)
    assert data.min() == -1
    assert 0.5 < data.max() <= 1
    assert ids.shape == (4, field.context)


def test_the_command_writes_here_and_over_nothing(tmp_path, monkeypatch):
    """By default not over the checkpoint that ships, which only the scripts make."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(World, "make", lambda world, out, args: asked.append(out) or {})
    main(WORLDS["shapes"], [])
    main(WORLDS["shapes"], ["--out", "there"])
    main(WORLDS["shapes"], [], out=ASSETS / "shapes")
    assert asked == [Path("shapes"), Path("there"), ASSETS / "shapes"]
    save_field(tiny(), tmp_path / "shapes")
    with pytest.raises(FileExistsError, match="shapes holds a checkpoint: give another --out"):
        main(WORLDS["shapes"], [])


def test_shapes_are_made_without_text_recognition():
    code = "import sys; sys.modules['rapidocr'] = sys.modules['rapidfuzz'] = None; import rlflow.pretrain.worlds"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", IMAGES)
def test_shipped_checkpoint_loads_and_names_its_making(name):
    config = json.loads((ASSETS / name / "config.json").read_text())
    assert {"command", "seed", "steps", "seconds", "versions"} <= set(config["made_by"])
    assert config["model"] == "dit"
    DiT(**config["args"]).load_state_dict(load_file(ASSETS / name / "model.safetensors"))
    assert (ASSETS / name / "model.safetensors").stat().st_size < 6e6


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_shipped_checkpoint_is_as_good_as_it_says_and_leaves_headroom(name):
    config = json.loads((ASSETS / name / "config.json").read_text())
    field = DiT(**config["args"])
    field.load_state_dict(load_file(ASSETS / name / "model.safetensors"))
    for what, value in IMAGES[name].evaluate(field).items():
        assert value == pytest.approx(config["made_by"][what], abs=0.02)
