"""Wan 2.1: our chain gives the latents and the frames of the stock WanPipeline (diffusers 0.42.1), to 1e-5 of their
length in float32, with either scheduler: UniPC, which it ships with, by our solver of that name, and flow matching's
Euler by ours. And the comparison sees what an adapter can get wrong.
"""

import copy
import json
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import rlflow as rf
from rlflow.flow.grid import FromScheduler
from rlflow.flow.guidance import CFG
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import Euler, UniPC
from rlflow.models.pretrained import lora as lora_files
from rlflow.models.pretrained.pipeline import PretrainedField, pretrained
from rlflow.models.pretrained.shapes_of import shape_of
from tests.models.pretrained.families.test_parity import EXACT, PROMPTS, WRONG
from tests.models.pretrained.test_pipeline import ByOne

HEIGHT, WIDTH, FRAMES, LENGTH, STEPS = 32, 48, 5, 24, 6
SIZES = {"resolution": HEIGHT, "width": WIDTH, "frames": FRAMES, "max_sequence_length": LENGTH}
ASKED = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "max_sequence_length": LENGTH}


@dataclass
class Stock:
    """A stock pipeline and our field of the same folder."""

    pipe: Any
    field: PretrainedField

    def theirs(self, x_0: Tensor, w: float, output_type: str = "latent", num_steps: int = STEPS) -> Tensor:
        """Latents of the stock pipeline from the noise x_0, or frames."""
        settings = {**ASKED, "num_inference_steps": num_steps, "output_type": output_type, "guidance_scale": w}
        return self.pipe(prompt=list(PROMPTS)[: len(x_0)], latents=x_0, **settings).frames

    def ours(self, x_0: Tensor, w: float, grid: Any = None, num_steps: int = STEPS) -> Tensor:
        """Latents of our ODE."""
        field = CFG(self.field, w) if w > 1 else self.field
        own = {"grid": grid or FromScheduler(self.field), "solver": self.field.adapter.solver, "num_steps": num_steps}
        policy = FlowPolicy(field, FlowSDE(), **own)
        with torch.no_grad():
            return policy.sample(policy.encode(self.field.tokenize(PROMPTS[: len(x_0)])), x_0=x_0).final

    def distance(self, w: float, ours: float | None = None, grid: Any = None, num_steps: int = STEPS) -> float:
        """|ours - theirs| / |theirs|."""
        x_0 = torch.randn(2, *self.field.event_shape)
        theirs = self.theirs(x_0, w, num_steps=num_steps)
        return float((self.ours(x_0, ours or w, grid, num_steps) - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def load(tiny_pipeline):
    """load(setting=...) -> a field of the tiny checkpoint as it ships."""
    return lambda **settings: pretrained(str(tiny_pipeline("wan")), **{**SIZES, **settings})


@pytest.fixture(scope="module")
def field(load) -> PretrainedField:
    """As it ships; whoever changes it gives it back."""
    return load()


@pytest.fixture(scope="module", params=["wan", "wan_euler"])
def stock(request, tiny_pipeline) -> Stock:
    from diffusers import DiffusionPipeline

    folder = tiny_pipeline(request.param)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    found = Stock(pipe, pretrained(str(folder), **SIZES).requires_grad_(False))
    assert isinstance(found.field.adapter.solver, UniPC if request.param == "wan" else Euler)
    return found


# -- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 3, STEPS])
def test_our_ode_gives_the_latents_of_the_stock_pipeline(stock, w, num_steps):
    assert stock.distance(w, num_steps=num_steps) < EXACT


def test_our_decoder_gives_the_frames_of_the_stock_pipeline(stock, monkeypatch):
    """Mean and spread of each channel; 1 + 4 k frames of 1 + k latents."""
    x_0 = torch.randn(2, *stock.field.event_shape)
    theirs = stock.theirs(x_0, 1.0, "pt")
    assert theirs.shape == (2, FRAMES, 3, HEIGHT, WIDTH)
    assert theirs.std() > 1e-2
    latents = stock.theirs(x_0, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(stock.field.decode(latents), theirs, rtol=0, atol=EXACT)
        monkeypatch.setattr(stock.field.adapter, "for_vae", lambda x: x)
        assert (stock.field.decode(latents) - theirs).abs().max() > 1e-2


def test_parity_sees_a_grid_shifted_by_one_entry(stock):
    assert stock.distance(1.0, grid=ByOne(stock.field)) > 1e-3


def test_parity_sees_guidance_that_is_ten_percent_off(stock):
    assert stock.distance(3.0, ours=3.3) > 1e-3


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_parity_sees(wrong, stock, monkeypatch):
    """UniPC's timesteps are cut to thousandths by itself: there it sees those that are not."""
    monkeypatch.setattr(stock.field.adapter, "predict", wrong(stock.field.adapter.predict))
    if stock.field.adapter.unipc and wrong is WRONG["a timestep that is truncated"]:
        monkeypatch.undo()
        monkeypatch.setattr(stock.field.adapter, "told", lambda sigma: 1000 * sigma)
    assert stock.distance(1.0) > 2 * EXACT


@pytest.mark.parametrize(("shift", "most"), [(1.0, 1), (3.0, 0), (5.0, 0), (8.0, 0)])
def test_the_network_is_told_the_whole_thousandths_of_unipc(shift, most, field, monkeypatch):
    """Of 1 - t as float32 has it; without a shift many are whole before, and its own rounding decides."""
    scheduler = copy.deepcopy(field.adapter.pipe.scheduler)
    scheduler.register_to_config(flow_shift=shift)
    monkeypatch.setattr(field.adapter.pipe, "scheduler", scheduler)
    for num_steps in range(1, 101):
        times = 1 - field.adapter.sigmas(num_steps, HEIGHT).double()
        scheduler.set_timesteps(num_steps)
        off = field.adapter.told(1 - times[:-1].float()).long() - scheduler.timesteps
        assert off.abs().max() <= most


# -- videos ---------------------------------------------------------------------------------------


def test_a_frame_is_made_of_its_latents_and_earlier_ones(field):
    """The decoder is causal, so a shorter video is the beginning of a longer one."""
    x = torch.randn(1, 4, 3, 8, 12)
    with torch.no_grad():
        whole, beginning = field.decode(x), field.decode(x[:, :, :2])
        later = x.clone()
        later[:, :, 2] += 1
        other = field.decode(later)
    assert (whole.shape[1], beginning.shape[1]) == (9, 5)
    torch.testing.assert_close(beginning, whole[:, :5], rtol=0, atol=1e-6)
    torch.testing.assert_close(other[:, :5], whole[:, :5], rtol=0, atol=1e-6)
    assert (other[:, 5:] - whole[:, 5:]).abs().max() > 1e-3


def test_the_shape_is_that_of_frames_and_sides(field):
    assert (field.frames, field.event_shape, field.adapter.tokens(HEIGHT)) == (5, (4, 2, 8, 12), 24)
    field.resize(64)
    assert field.event_shape == (4, 2, 16, 24), "the picture keeps its shape"
    field.resize(HEIGHT)
    real = shape_of("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", {"resolution": 480, "width": 832})
    assert (real.event_shape, real.frames) == ((16, 21, 60, 104), 81)


def test_sizes_that_it_cannot_make_are_refused(load, tiny_pipeline):
    with pytest.raises(ValueError, match=r"frames=6: the VAE makes 1 \+ 4 k of them, such as 5 or 81"):
        load(frames=6)
    with pytest.raises(ValueError, match="width 50 must be a positive multiple of 8"):
        load(width=50)
    with pytest.raises(ValueError, match="makes square pictures: leave width and frames out"):
        pretrained(str(tiny_pipeline("sd3")), resolution=32, frames=5)


def test_a_gradient_comes_through_the_decoder_made_again(field):
    """Of each row's video alone, and the same as without making it again."""
    x = torch.randn(2, *field.event_shape, requires_grad=True)
    (once,) = torch.autograd.grad(field.decode(x)[0].square().sum(), x)
    assert once[0].norm() > 0
    assert once[1].norm() == 0
    kept = field.adapter.picture(field.adapter.for_vae(x[:1])) / 2 + 0.5
    (whole,) = torch.autograd.grad(kept.clamp(0, 1).square().sum(), x)
    torch.testing.assert_close(once, whole, rtol=1e-5, atol=1e-6)


def test_load_samples_as_the_pipeline_does(tiny_pipeline):
    policy = rf.load(tiny_pipeline("wan"), resolution=HEIGHT, frames=FRAMES)
    assert (type(policy.field), policy.field.scale, policy.num_steps) == (CFG, 5.0, 50)
    assert isinstance(policy.solver, UniPC)
    assert rf.sample(policy, ["a cat"], num_steps=2).shape == (1, FRAMES, 3, HEIGHT, HEIGHT)


# -- texts, files ---------------------------------------------------------------------------------


def test_a_text_has_the_mean_of_its_tokens_and_zeros_behind_them(field):
    cpu = torch.device("cpu")
    with torch.no_grad():
        found = [field.adapter.encode(PROMPTS[:1], length, cpu) for length in (LENGTH, 2 * LENGTH)]
    assert [len(each["tokens"][0]) for each in found] == [LENGTH, 2 * LENGTH]
    own = len(field.adapter.pipe.tokenizer(PROMPTS[0])["input_ids"])
    for each in found:
        assert each["tokens"][0, own:].abs().max() == 0
        torch.testing.assert_close(each["pooled"][0], each["tokens"][0, :own].mean(0))
    torch.testing.assert_close(found[0]["pooled"], found[1]["pooled"])


def test_weights_of_half_precision_keep_norms_and_time_in_float32(load):
    field = load(weights="bfloat16", lora=2)
    assert field.weight_dtype == torch.bfloat16
    assert field.transformer.blocks[0].scale_shift_table.dtype == torch.float32
    assert field.transformer.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16


def test_a_saved_lora_gives_the_same_video_in_plain_diffusers(load, tiny_pipeline, tmp_path):
    from diffusers import DiffusionPipeline

    field = load(lora=2)
    names = {name.removesuffix(".lora_A.default.weight") for name in lora_files.parameters(field.transformer)}
    layers = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0")
    assert {f"blocks.{i}.{layer}" for i in range(2) for layer in layers} <= names
    with torch.no_grad():
        for parameter in lora_files.parameters(field.transformer).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    rf.save(FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=3), tmp_path / "lora")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "import WanPipeline" in card
    assert "- text-to-video" in card
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline("wan"))
    pipe.set_progress_bar_config(disable=True)
    x_0 = torch.randn(1, *field.event_shape)
    untuned = Stock(pipe, field).theirs(x_0, 1.0, "pt", 3)
    pipe.load_lora_weights(tmp_path / "lora")
    tuned = Stock(pipe, field).theirs(x_0, 1.0, "pt", 3)
    for ours in (field, rf.load(tmp_path / "lora").field.unguided):
        with torch.no_grad():
            frames = ours.decode(Stock(pipe, ours).ours(x_0, 1.0, num_steps=3))
        torch.testing.assert_close(frames, tuned, rtol=0, atol=1e-4)
    assert (tuned - untuned).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("file", "changed", "why"),
    [
        ("model_index.json", {"boundary_ratio": 0.9}, "two networks, or a timestep for each token"),
        ("model_index.json", {"expand_timesteps": True}, "two networks, or a timestep for each token"),
        ("scheduler/scheduler_config.json", {"solver_order": 3}, "solver_order is 3, .* of a flow has 2: set it so"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": False}, "use_flow_sigmas is False, .* has True"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding is True, .* has False"),
    ],
)
def test_what_its_pipeline_would_not_sample_as_we_do_is_refused(file, changed, why, tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline("wan"), tmp_path / "other")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changed))
    with pytest.raises(ValueError, match=why):
        pretrained(str(folder), **SIZES)
