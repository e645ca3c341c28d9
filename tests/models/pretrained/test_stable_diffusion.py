"""Stable Diffusion 1.5 and XL: our chain gives the latents of the stock pipeline with DDIM; what is refused."""

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
from rlflow.flow.steps import AllButLast
from rlflow.models.pretrained.pipeline import PretrainedField, pretrained
from rlflow.models.pretrained.shapes_of import shape_of

SIDE = 32
PROMPTS = ["a red cat", "two dogs in front of a very long house with many windows, at night, and a third dog"]
KINDS = {
    "sd15": {},
    "sd15-v": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "sdxl": {},
    "sdxl-v": {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
}
DDIM = {"clip_sample": False, "set_alpha_to_one": True}


@dataclass
class Stock:
    """A stock pipeline with a DDIM scheduler and our field of the same folder."""

    pipe: Any
    field: PretrainedField
    start: Tensor
    known: dict[Any, Tensor]

    def theirs(self, num_steps: int, guidance: float) -> Tensor:
        """Latents of the stock pipeline; made once."""
        if (num_steps, guidance) not in self.known:
            settings = {"num_inference_steps": num_steps, "guidance_scale": guidance, "height": SIDE, "width": SIDE}
            found = self.pipe(PROMPTS, latents=self.start, output_type="latent", **settings)
            self.known[num_steps, guidance] = found.images
        return self.known[num_steps, guidance]

    def distance(self, num_steps: int, guidance: float, ours: float | None = None, grid: Any = None) -> float:
        """|ours - theirs| / |theirs|."""
        field = CFG(self.field, ours or guidance) if guidance > 1 else self.field
        policy = FlowPolicy(field, FlowSDE(), grid=grid or FromScheduler(self.field), num_steps=num_steps)
        policy.multiple = 1  # rows need not be filled up to be compared to 1e-5
        with torch.no_grad():
            found = policy.sample(policy.encode(self.field.tokenize(PROMPTS)), x_0=self.start).final
        theirs = self.theirs(num_steps, guidance)
        return float((found - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module", params=KINDS)
def stock(request, tiny_pipeline) -> Stock:
    from diffusers import DDIMScheduler, DiffusionPipeline

    folder = tiny_pipeline(request.param.removesuffix("-v"), **KINDS[request.param])
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **DDIM)
    pipe.set_progress_bar_config(disable=True)
    field = pretrained(str(folder), resolution=SIDE).requires_grad_(False)
    return Stock(pipe, field, torch.randn(2, *field.event_shape, generator=torch.Generator().manual_seed(5)), {})


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("num_steps", [5, 20])
def test_our_ode_gives_the_latents_of_the_stock_pipeline(num_steps, guidance, stock):
    assert stock.distance(num_steps, guidance) < 1e-5


class ByOne:
    """Every step begins an index of the table too early."""

    def __init__(self, field: PretrainedField):
        self.field = field

    def __call__(self, num_steps: int) -> Tensor:
        t, table = self.field.times(num_steps), self.field.adapter.table
        return torch.cat([table.times[(table.index(t[:-1]).long() - 1)], t[-1:]])


def test_parity_sees_a_grid_shifted_by_one_entry(stock):
    assert stock.distance(5, 1.0, grid=ByOne(stock.field)) > 1e-4


def test_parity_sees_guidance_that_is_ten_percent_off(stock):
    assert stock.distance(5, 4.5, ours=4.95) > 1e-4


@pytest.mark.parametrize("wrong", ["truncated", "flipped"])
def test_parity_sees_a_truncated_timestep_and_a_flipped_sign(wrong, stock, monkeypatch):
    adapter = stock.field.adapter
    predict = adapter.predict
    monkeypatch.setattr(
        adapter,
        "predict",
        (lambda x, sigma, text: predict(x, (1000 * sigma).long() / 1000, text))
        if wrong == "truncated"
        else (lambda x, sigma, text: -predict(x, sigma, text)),
    )
    assert stock.distance(5, 1.0) > 1e-4


# -- the border -----------------------------------------------------------------------------------


@pytest.fixture
def load(tiny_pipeline):
    """load(kind, setting=...) -> a field of the tiny checkpoint."""
    return lambda kind, **settings: pretrained(str(tiny_pipeline(kind)), **{"resolution": SIDE, **settings})


def test_grids_are_entries_of_the_table_and_end_at_the_data(load):
    field = load("sd15", lora=2)
    table = field.adapter.table
    assert field.first_time == pytest.approx(0.0640, abs=1e-4)
    assert table.index(field.times(5)[:-1]).tolist() == [801, 601, 401, 201, 1]
    assert field.times(5)[-1] == 1
    with pytest.raises(ValueError, match="1000 steps are more than the 1000 of the scheduler's table"):
        field.times(1000)
    policy = FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=20)
    policy.check_steps(AllButLast(skip_last=2))
    with pytest.raises(ValueError, match=r"steps \[18\] of 20 end too near the data"):
        policy.check_steps(AllButLast(skip_last=1))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_noisy_chain_scores_as_it_sampled(kind, load):
    """Pairs that were sampled among eight rows and are scored alone: the log-ratio is exactly 0."""
    field = load(kind, lora=2)
    policy = FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=4)
    plan = AllButLast(skip_last=2)(0, policy.times(4), torch.arange(8))
    with torch.no_grad():
        cond = policy.encode(field.tokenize(PROMPTS * 4))
        chain = policy.sample(cond, plan)
        again = policy.transition(chain.x[3:4, 0], chain.t[3:4, 0], chain.t_next[3:4, 0], cond.index(torch.tensor([3])))
    assert torch.equal(again.mean, chain.mean[3:4, 0])


def test_the_pooled_vector_is_the_mean_of_the_tokens_without_padding(load):
    field = load("sd15", lora=2)
    found = field.table(field.tokenize(["ab"]))
    assert field.num_features == found["pooled"].shape[1] == 16
    torch.testing.assert_close(found["pooled"], found["tokens"][:, :4].mean(1))  # start, two letters, end


def test_an_empty_text_is_zeros_where_the_pipeline_says_so(load, tiny_pipeline, tmp_path):
    """And a negative prompt is text."""
    text = load("sdxl", lora=2).table(torch.tensor([0]))
    assert not any(value.any() for value in text.values())
    folder = shutil.copytree(tiny_pipeline("sdxl"), tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    for field in (load("sdxl", lora=2, negative_prompt="ugly"), pretrained(str(folder), resolution=SIDE, lora=2)):
        assert all(value.any() for value in field.table(torch.tensor([0])).values())


REFUSED = {
    "clip": (
        "scheduler/scheduler_config.json",
        {"_class_name": "DDIMScheduler", "clip_sample": True},
        "clip_sample is on",
    ),
    "karras": (
        "scheduler/scheduler_config.json",
        {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
        "use_karras_sigmas is on, and our steps know nothing of it",
    ),
    "sample": ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "the network predicts 'sample'"),
    "lcm": ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "LCMScheduler has no steps that ours"),
    "distilled": ("unet/config.json", {"time_cond_proj_dim": 8}, "the network is distilled"),
    "inpainting": ("unet/config.json", {"in_channels": 9}, "are not those of a text-to-image network"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_sample_otherwise_is_refused(case, tiny_pipeline, tmp_path):
    """By whoever only plans a run on it; opening asks the same."""
    file, settings, why = REFUSED[case]
    folder = shutil.copytree(tiny_pipeline("sdxl" if case == "clip" else "sd15"), tmp_path / "tiny")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | settings))
    if "_class_name" in settings:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(
            json.dumps(index | {"scheduler": ["diffusers", settings["_class_name"]]})
        )
    with pytest.raises(ValueError, match=f"{file}: .*{why}"):
        shape_of(str(folder), {"resolution": SIDE})
    if file.startswith("scheduler"):
        with pytest.raises(ValueError, match=f"{file}: .*{why}"):
            pretrained(str(folder), resolution=SIDE)


def test_texts_have_one_length(load):
    with pytest.raises(ValueError, match="reads all of CLIP's tokens, always: leave max_sequence_length out"):
        load("sd15", max_sequence_length=24)


def test_what_stands_behind_the_pictures_is_not_loaded(tiny_pipeline, tmp_path):
    """As in the published folders of 1.5: the classes that its index names are not even imported."""
    folder = shutil.copytree(tiny_pipeline("sd15"), tmp_path / "tiny")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["nowhere", "Nothing"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    policy = rf.load(folder, num_steps=2)
    assert (policy.field.scale, policy.field.unguided.resolution) == (7.5, SIDE)
    assert rf.sample(policy, "a cat").shape == (1, 3, SIDE, SIDE)
