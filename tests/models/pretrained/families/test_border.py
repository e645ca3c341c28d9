"""What differs between families besides the loop: texts, grids, LoRA, distillation, files. Each was a trap once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import rlflow as rf
from rlflow.flow.grid import FromScheduler
from rlflow.flow.guidance import CFG, CFGNorm
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import AllButLast, NoSteps
from rlflow.models.pretrained import lora as lora_files
from rlflow.models.pretrained.families.packing import pack
from rlflow.models.pretrained.families.qwen_image import QwenImage
from rlflow.models.pretrained.pipeline import PretrainedField, named_distilled, pretrained
from rlflow.models.pretrained.shapes_of import shape_of
from rlflow.models.prompt_table import PromptTable
from rlflow.rl.critic import Critic
from rlflow.rl.likelihoods.cfm import CFMLikelihood

SIDE, LENGTH = 32, 40
KINDS, RAGGED = ["klein", "z_image", "qwen_image"], ["z_image", "qwen_image"]
SHORT, LONG = "a cat", "two dogs in front of a house"
BLOCKS = {
    "klein": {"transformer_blocks", "single_transformer_blocks"},
    "z_image": {"layers", "noise_refiner", "context_refiner"},
    "qwen_image": {"transformer_blocks"},
}


@pytest.fixture(scope="module")
def load(tiny_pipeline):
    """load(kind, setting=...) -> a field of the tiny checkpoint."""

    def load(kind: str, **settings: Any) -> PretrainedField:
        return pretrained(str(tiny_pipeline(kind)), **{"resolution": SIDE, "max_sequence_length": LENGTH, **settings})

    return load


def policy_of(field: PretrainedField, num_steps: int = 4) -> FlowPolicy:
    return FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=num_steps)


@torch.no_grad()
def velocity(field: PretrainedField, texts: list[str], rows: int = 16) -> torch.Tensor:
    """At one place, of the first text; with the others beside it."""
    texts = (texts * rows)[:rows]
    x = torch.randn(1, *field.event_shape, generator=torch.Generator().manual_seed(1)).expand(rows, -1, -1, -1)
    t = torch.full((rows,), 0.3)
    return field(x, t, 0 * t, field.encode(field.tokenize(texts)))[0]


# -- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_a_summary_has_the_mean_of_its_tokens(kind, load):
    """Padding is none of them, however much there is; a critic reads it."""
    less, more = load(kind), load(kind, max_sequence_length=2 * LENGTH)
    found = [field.encode(field.tokenize([SHORT]))["pooled"] for field in (less, more)]
    assert found[0].shape == (1, less.num_features)
    torch.testing.assert_close(*found)
    text = less.table(less.tokenize([SHORT]))["tokens"][0]
    own = len(text) if less.ragged else less.adapter.text_lengths([SHORT], LENGTH)[0]
    torch.testing.assert_close(found[0][0], text[:own].mean(0))
    assert less.ragged or own < LENGTH
    cond = less.encode(less.tokenize([SHORT, LONG]))
    values = Critic(less.num_features)(cond)
    assert values[0] != values[1]


def test_ragged_texts_are_padded_to_the_longest_of_a_batch_with_a_mask():
    texts = {"aa": torch.ones(2, 3), "a": torch.ones(1, 3)}
    table = PromptTable(lambda asked: {"tokens": [texts[t] for t in asked], "pooled": torch.ones(len(asked), 4)})
    found = table(table.numbers(["a", "aa", "a"]))
    assert found["tokens"].shape == (3, 2, 3)
    assert found["mask"].tolist() == [[True, False], [True, True], [True, False]]
    assert torch.equal(found["tokens"][..., 0], found["mask"].float())
    assert set(table(table.numbers(["a", "a"]))) == {"tokens", "pooled"}, "texts of one length need none"


@pytest.mark.parametrize("kind", RAGGED)
def test_padding_changes_a_velocity_by_a_rounding_and_no_more(kind, load):
    """So the first ratio is 1 to rounding: exactly where a micro-batch has texts of one length."""
    field = load(kind)
    assert field.ragged
    alone, beside = velocity(field, [SHORT]), velocity(field, [SHORT, LONG])
    assert (alone - beside).norm() < 5e-6 * alone.norm()
    assert torch.equal(alone, velocity(field, [SHORT, SHORT[::-1]])), "texts of one length"
    assert (alone - velocity(field, [LONG])).norm() > 1e-2 * alone.norm(), "and the text matters"


@pytest.mark.parametrize("kind", KINDS)
def test_a_texts_encoding_does_not_depend_on_its_company(kind, load):
    """Bit for bit, so a resumed run is too; Qwen-Image's own pipeline pads a batch before it encodes."""
    alone, together = load(kind), load(kind)
    many = [SHORT, LONG, *(f"number {i}" for i in range(3))]
    numbers = together.tokenize(many)
    together.table(numbers)
    for text, number in zip(many[:2], numbers, strict=False):
        mine, theirs = alone.table(alone.tokenize([text])), together.table(number[None])
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_tiny_tokenizer_drops_qwens_template_whole(load):
    """34 tokens of it, as the published one does."""
    pipe = load("qwen_image").adapter.pipe
    before = pipe.prompt_template_encode.partition("{}")[0]
    assert len(pipe.tokenizer(before)["input_ids"]) == pipe.prompt_template_encode_start_idx == 34


# -- grids ----------------------------------------------------------------------------------------


def test_kleins_shift_depends_on_the_tokens_and_on_the_steps():
    """At 512 pixels the last step begins at sigma .45 of 10 steps and .19 of 28: a recipe that trains with one and is
    judged with the other has two shifts, and kappa is that of the grid in place."""
    field = shape_of("black-forest-labs/FLUX.2-klein-base-4B", {"resolution": 512})
    assert [round(field.adapter.mu(k, 512), 2) for k in (10, 28)] == [1.99, 1.86]
    ends = {k: float(1 - field.times(k)[-2]) for k in (10, 28)}
    assert ends == {10: pytest.approx(0.45, abs=0.005), 28: pytest.approx(0.19, abs=0.005)}
    field.resize(1024)
    assert float(1 - field.times(10)[-2]) > ends[10]
    field.resize(512)
    grids = {k: field.times(k) for k in (10, 28)}
    policy = FlowPolicy(field, FlowSDE(), grid=lambda k: grids[k], num_steps=10)
    kappa = {k: policy.kappa(t[:-1], t[1:])[:-1].max() for k, t in grids.items()}
    assert kappa[10] != kappa[28]
    between = float(sum(kappa.values())) / 2
    for k in grids:
        policy.num_steps = k
        if kappa[k] < between:
            policy.check_steps(AllButLast(), between)
        else:
            with pytest.raises(ValueError, match="has kappa"):
                policy.check_steps(AllButLast(), between)


def test_qwens_last_step_is_never_scored_though_float32_misses_its_terminal_sigma(load):
    field = load("qwen_image")
    grids = [field.times(k) for k in range(2, 60)]
    assert {float(1 - t[-2]) < 0.02 for t in grids} == {True, False}
    assert {field.unscored(t) for t in grids} == {2}


def test_a_pipeline_that_fixes_its_sigmas_fixes_the_number_of_steps(load):
    class Fixed(QwenImage):
        def unshifted(self, num_steps: int) -> list[float]:
            return [1.0, 0.6, 0.2]

    adapter = Fixed(load("qwen_image").adapter.pipe)
    assert len(adapter.sigmas(3, SIDE)) == 4
    with pytest.raises(ValueError, match="samples in 3 steps of its own, and not in 4"):
        adapter.sigmas(4, SIDE)


# -- LoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_is_on_every_block(kind, load):
    """FLUX.2's single blocks have no `attn.to_q`, and in its double ones `attn.to_out` is a list."""
    field = load(kind, lora=2)
    names = {name.removesuffix(".lora_A.default.weight") for name in lora_files.parameters(field.transformer)}
    reached = {tuple(name.split(".")[:2]) for name in names}
    lists = {name for name, child in field.transformer.named_children() if isinstance(child, torch.nn.ModuleList)}
    assert lists == BLOCKS[kind]
    assert reached == {(name, str(i)) for name in lists for i in range(len(getattr(field.transformer, name)))}


def test_a_pattern_that_reaches_blocks_of_one_kind_only_is_refused(load):
    why = r"\['attn.to_q'\] reach no layer of single_transformer_blocks, .*'attn.to_qkv_mlp_proj'.*transformer_blocks.0"
    with pytest.raises(ValueError, match=why):
        load("klein", lora=2, lora_modules=["attn.to_q"])
    with pytest.raises(ValueError, match="no layer of Flux2Transformer2DModel ends in 'attention.to_q'"):
        load("klein", lora=2, lora_modules=["attention.to_q"])
    named = load("klein", lora=2, lora_modules=["transformer_blocks.0.attn.to_q"])
    assert len(lora_files.parameters(named.transformer)) == 2


PLAIN = {"klein": {"guidance_scale": 1.0}, "z_image": {"guidance_scale": 0.0}, "qwen_image": {"true_cfg_scale": 1.0}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_lora_gives_the_same_picture_in_plain_diffusers(kind, load, tiny_pipeline, tmp_path):
    from diffusers import DiffusionPipeline

    field = load(kind, lora=2)
    with torch.no_grad():
        for parameter in lora_files.parameters(field.transformer).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    rf.save(policy_of(field), tmp_path / "lora")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert f"import {type(field.adapter.pipe).__name__}" in card
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline(kind))
    pipe.load_lora_weights(tmp_path / "lora")
    pipe.set_progress_bar_config(disable=True)
    x_0 = torch.randn(1, *field.event_shape)
    settings = {"num_inference_steps": 3, "height": SIDE, "width": SIDE, "max_sequence_length": LENGTH, **PLAIN[kind]}
    start = pack(x_0) if kind == "qwen_image" else x_0
    theirs = pipe(prompt=LONG, latents=start, output_type="pt", **settings).images

    def ours(field: PretrainedField) -> torch.Tensor:
        policy = policy_of(field, 3)
        with torch.no_grad():
            return field.decode(policy.sample(policy.encode(field.tokenize([LONG])), x_0=x_0).final)

    torch.testing.assert_close(ours(field), theirs, rtol=0, atol=1e-4)
    again = rf.load(tmp_path / "lora").field.unguided
    torch.testing.assert_close(ours(again), theirs, rtol=0, atol=1e-4)
    assert (ours(load(kind)) - theirs).abs().max() > 1e-2


# -- distilled ------------------------------------------------------------------------------------


@pytest.fixture
def distilled(tiny_pipeline, tmp_path):
    """distilled(kind) -> the folder of a tiny model whose files say that it is, where they can; else its name does."""

    def make(kind: str) -> Path:
        if kind == "z_image":
            return tiny_pipeline(kind, shift=3.0)
        folder = shutil.copytree(
            tiny_pipeline(kind), tmp_path / ("Qwen-Image-Lightning" if kind == "qwen_image" else kind)
        )
        index = folder / "model_index.json"
        said = {"is_distilled": True} if kind == "klein" else {}
        index.write_text(json.dumps(json.loads(index.read_text()) | said))
        return folder

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_matching_loss_on_a_distilled_model_is_refused_unless_asked_for(kind, load, distilled):
    base, other = load(kind, lora=2), pretrained(str(distilled(kind)), resolution=SIDE, lora=2)
    CFMLikelihood().check(policy_of(base), NoSteps())
    with pytest.raises(ValueError, match=r"distilled to a few steps, .*likelihood.allow_distilled=true"):
        CFMLikelihood().check(policy_of(other), NoSteps())
    CFMLikelihood(allow_distilled=True).check(policy_of(other), NoSteps())


@pytest.mark.parametrize("kind", ["klein", "z_image"])
def test_a_distilled_model_samples_in_its_few_steps_without_guidance(kind, distilled):
    policy = rf.load(distilled(kind), resolution=SIDE)
    assert policy.field is policy.field.unguided
    assert policy.num_steps < 10


@pytest.mark.parametrize(
    ("name", "is_distilled"),
    [
        ("stabilityai/stable-diffusion-3.5-large-turbo", True),
        ("stabilityai/stable-diffusion-3.5-large", False),
        ("/cache/models--Tongyi-MAI--Z-Image-Turbo/snapshots/0a1b", True),
        ("/turbo/models/sd3", False),
        ("someone/Z-Image-De-Turbo", False),
        ("someone/Hyper-SD3", True),
    ],
)
def test_names_that_say_so(name, is_distilled):
    assert (named_distilled(name) is not None) == is_distilled


def test_a_family_that_the_installed_diffusers_lacks_is_said(monkeypatch, tiny_pipeline):
    import diffusers

    monkeypatch.setattr(diffusers, "ZImagePipeline", None)
    with pytest.raises(ValueError, match="diffusers 0.* has no ZImagePipeline: pip install -U diffusers"):
        pretrained(str(tiny_pipeline("z_image")), resolution=SIDE)


# -- the rest of the border -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "guided", "scale"), [("klein", CFG, 4.0), ("z_image", CFG, 6.0), ("qwen_image", CFGNorm, 4.0)]
)
def test_load_samples_as_the_pipeline_does(kind, guided, scale, tiny_pipeline):
    """Its steps, its guidance with the scale in our convention: Z-Image's counts from 0."""
    policy = rf.load(tiny_pipeline(kind), resolution=SIDE)
    assert (type(policy.field), policy.field.scale, policy.num_steps) == (guided, scale, 50)
    assert rf.sample(policy, ["a cat"], num_steps=2).shape == (1, 3, SIDE, SIDE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_comes_through_the_decoder(kind, load):
    """Of each row's picture alone, made again on the way back."""
    field = load(kind)
    x = torch.randn(2, *field.event_shape, requires_grad=True)
    field.decode(x)[0].sum().backward()
    assert x.grad[0].norm() > 0
    assert x.grad[1].norm() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_resolutions_are_of_whole_tokens(kind, load):
    field = load(kind)
    with pytest.raises(ValueError, match="must be a positive multiple of 8"):
        field.resize(36)
    field.resize(64)
    assert field.event_shape[1:] == ((8, 8) if kind == "klein" else (16, 16))
