"""LoRA files of other programs, read and written: the same product in every form, the same picture in plain diffusers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlflow.commands.export import FORMATS as OFFERED
from rlflow.flow.grid import FromScheduler
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.models.io import save_field
from rlflow.models.pretrained.families.packing import pack
from rlflow.models.pretrained.foreign_lora import Found, read_lora
from rlflow.models.pretrained.lora_formats import FORMATS, Saved, read_saved, write_as
from rlflow.models.pretrained.pipeline import PretrainedField, pretrained

SIDE, PROMPT = 32, "a red cat"
KINDS = ("sd3", "flux", "sd15", "sdxl")
UNETS = ("sd15", "sdxl")
TEXT = {"sd3": {"max_sequence_length": 24}, "flux": {"max_sequence_length": 24}}
LAYERS = {
    "sd3": ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0", "proj_out"),
    "flux": ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_k", "proj_out"),
    "sd15": ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1", "conv_in"),
    "sdxl": ("down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0", "up_blocks.0.attentions.1.proj_in"),
}
LAYERS["sd15"] += ("up_blocks.1.attentions.0.proj_in",)  # a convolution of 1 x 1


@pytest.fixture(scope="module")
def fields(tiny_pipeline) -> Callable[[str], PretrainedField]:
    """fields(kind) -> the tiny checkpoint without any LoRA; opened once, and not to be changed."""
    opened: dict[str, PretrainedField] = {}

    def get(kind: str) -> PretrainedField:
        if kind not in opened:
            opened[kind] = pretrained(str(tiny_pipeline(kind)), resolution=SIDE, **TEXT.get(kind, {}))
        return opened[kind]

    return get


def lora(field: PretrainedField, layers: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """By layer: A, B, sizes of a DoRA; ranks 2, 3, ... in turn."""
    generator, modules, found = torch.Generator().manual_seed(4), dict(field.transformer.named_modules()), {}
    for rank, layer in enumerate(layers, 2):
        out, into, *kernel = modules[layer].weight.shape
        shapes = {"a": (rank, into, *kernel), "b": (out, rank, *[1] * len(kernel)), "sizes": (out,)}
        found[layer] = {part: 0.1 * torch.randn(shape, generator=generator) for part, shape in shapes.items()}
    return found


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return scale * b.flatten(1) @ a.flatten(1)


def deltas(found: Found) -> dict[str, Tensor]:
    """scale B A by layer, as peft reads settings and tensors."""
    saved = Saved("unet", dict(found.settings), found.tensors)
    names = [name.removesuffix(".lora_A.weight") for name in found.tensors if name.endswith(".lora_A.weight")]
    ends = ("lora_A.weight", "lora_B.weight")
    return {n: delta(*(found.tensors[f"{n}.{end}"] for end in ends), saved.scale(n)) for n in names}


def kohya(prefix: str) -> Callable[[str], tuple[str, str, str]]:
    return lambda layer: (prefix + layer.replace(".", "_"), "lora_down.weight", "lora_up.weight")


def dotted(
    prefix: str, down: str = "lora_A.weight", up: str = "lora_B.weight"
) -> Callable[[str], tuple[str, str, str]]:
    return lambda layer: (prefix + layer, down, up)


FORMS: dict[str, tuple[tuple[str, ...], Callable[[str], tuple[str, str, str]]]] = {
    # kinds, and of a layer its name in the file and the ends of the two tensors
    "kohya-unet": (UNETS, kohya("lora_unet_")),
    "kohya-transformer": (("sd3", "flux"), kohya("lora_transformer_")),
    "lycoris": (KINDS, kohya("lycoris_")),
    "ai-toolkit": (KINDS, dotted("diffusion_model.")),
    "of-pipelines": (UNETS, dotted("unet.")),
    "comfyui": (("sd3", "flux"), dotted("transformer.", "lora_down.weight", "lora_up.weight")),
    "default": (KINDS, dotted("base_model.model.", "lora_A.default.weight", "lora_B.default.weight")),
}
CASES = [(kind, form) for form, (kinds, _) in FORMS.items() for kind in kinds]


@pytest.mark.parametrize(("kind", "form"), CASES, ids=map("-".join, CASES))
def test_every_form_gives_the_same_product(kind, form, fields, tmp_path):
    """Alpha tensors of two layers, and none of the others, whose alpha is their rank."""
    field, names = fields(kind), FORMS[form][1]
    state, want = {}, {}
    for i, (layer, parts) in enumerate(lora(field, LAYERS[kind]).items()):
        stem, down, up = names(layer)
        state |= {f"{stem}.{down}": parts["a"], f"{stem}.{up}": parts["b"]}
        if i < 2:
            state[f"{stem}.alpha"] = torch.tensor(1.5 + i)
        want[layer] = delta(parts["a"], parts["b"], (1.5 + i) / len(parts["a"]) if i < 2 else 1.0)
    save_file(state, tmp_path / "a.safetensors")
    found = read_lora(str(tmp_path / "a.safetensors"), field.adapter)
    assert found.scale_from == "the file's alpha tensors"
    torch.testing.assert_close(deltas(found), want)


def test_names_from_before_peft(fields, tmp_path):
    layer = LAYERS["sd15"][0]
    parts = lora(fields("sd15"), (layer,))[layer]
    old = "unet." + layer.replace("attn1.to_q", "attn1.processor.to_q_lora")
    save_file({f"{old}.down.weight": parts["a"], f"{old}.up.weight": parts["b"]}, tmp_path / "a.safetensors")
    found = read_lora(str(tmp_path / "a.safetensors"), fields("sd15").adapter)
    assert found.scale_from == "no place in the file: alpha is the rank"
    torch.testing.assert_close(deltas(found), {layer: delta(parts["a"], parts["b"], 1.0)})


SGM = {
    "input_blocks_3_1_transformer_blocks_1_attn2_to_out_0": LAYERS["sdxl"][0],
    "input_blocks_3_0_emb_layers_1": "down_blocks.1.resnets.0.time_emb_proj",
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "output_blocks_1_1_proj_in": LAYERS["sdxl"][1],
    "input_blocks_0_0": "conv_in",
}


def test_names_of_the_first_release_of_xl(fields, tmp_path):
    """Diffusers says which layers they are; alphas and the sizes of a DoRA, which it leaves out, go along."""
    parts = lora(fields("sdxl"), tuple(SGM.values()))
    state = {}
    for name, layer in SGM.items():
        p = parts[layer]
        state |= {f"lora_unet_{name}.lora_down.weight": p["a"], f"lora_unet_{name}.lora_up.weight": p["b"]}
        state |= {f"lora_unet_{name}.alpha": torch.tensor(0.5), f"lora_unet_{name}.dora_scale": p["sizes"].unsqueeze(1)}
    save_file(state, tmp_path / "a.safetensors")
    found = read_lora(str(tmp_path / "a.safetensors"), fields("sdxl").adapter)
    want = {layer: delta(p["a"], p["b"], 0.5 / len(p["a"])) for layer, p in parts.items()}
    torch.testing.assert_close(deltas(found), want)
    assert found.settings["use_dora"]
    for layer, p in parts.items():
        assert torch.equal(found.tensors[f"{layer}.lora_magnitude_vector"].flatten(), p["sizes"])


def test_what_a_converter_loses_is_refused(fields, tmp_path, monkeypatch):
    """The pipeline's own loader is believed only where the squares of what the LoRA adds stay."""
    field, g = fields("flux"), torch.Generator().manual_seed(0)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {f"{name}.lora_down.weight": torch.randn(2, 16, generator=g), f"{name}.alpha": torch.tensor(1.0)}
    state[f"{name}.lora_up.weight"] = torch.randn(48, 2, generator=g)
    save_file(state, tmp_path / "a.safetensors")
    found = read_lora(str(tmp_path / "a.safetensors"), field.adapter)
    assert "which diffusers' converter multiplied in" in found.scale_from
    whole = delta(state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"], 0.5)
    parts = deltas(found)
    thirds = [parts[f"transformer_blocks.0.attn.to_{part}"] for part in "qkv"]
    torch.testing.assert_close(torch.cat(thirds), whole)
    pipeline = type(field.adapter.pipe)
    convert = pipeline.lora_state_dict
    without = {f"{name}.alpha"}
    monkeypatch.setattr(
        pipeline, "lora_state_dict", lambda raw: convert({k: v for k, v in raw.items() if k not in without})
    )
    with pytest.raises(ValueError, match="makes 3 layers of its 1, and the square of what they add was .*is lost"):
        read_lora(str(tmp_path / "a.safetensors"), field.adapter)


# -- writing --------------------------------------------------------------------------------------

STARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"lora_alpha": 5, "alpha_pattern": {"to_q": 1.5}, "rank_pattern": {"to_k": 3}},
    "rslora-dora": {"lora_alpha": 3, "use_rslora": True, "use_dora": True},
}


def test_the_command_offers_every_format():
    assert set(OFFERED) == {*FORMATS, "lerobot"}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["sd3", "sd15"])
def test_what_is_written_reads_as_what_was_saved(kind, start, form, fields, tmp_path):
    """Scale, ranks layer by layer, sizes of a DoRA."""
    layers = LAYERS[kind] + tuple(name.replace("to_q", "to_k") for name in LAYERS[kind][:1])
    settings = {"r": 2, "lora_alpha": 2, "target_modules": list(layers), **STARTS[start]}
    tensors, ranks = {}, settings.get("rank_pattern", {})
    modules = dict(fields(kind).transformer.named_modules())
    for layer in layers:
        rank = next((r for end, r in ranks.items() if layer.endswith(end)), 2)
        out, into, *kernel = modules[layer].weight.shape
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, into, *kernel)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(out, rank, *[1] * len(kernel))
        if settings.get("use_dora"):
            tensors[f"{layer}.lora_magnitude_vector"] = torch.rand((1, out, 1, 1) if kernel else (out,))
    saved = Saved(fields(kind).adapter.component, settings, tensors)
    found = read_lora(str(write_as(saved, tmp_path, form)), fields(kind).adapter)
    before = deltas(Found(settings, tensors, ""))
    torch.testing.assert_close(deltas(found), before)
    assert len({round(saved.scale(layer), 6) for layer in layers}) == (1 + (start == "patterns") * 2)
    assert {n for n in found.tensors if "magnitude" in n} == {n for n in tensors if "magnitude" in n}
    assert all(torch.equal(found.tensors[n], v) for n, v in tensors.items() if "magnitude" in n)


def test_what_a_format_has_no_place_for_is_refused(tmp_path):
    tensors = {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1), "a.lora_B.bias": torch.ones(2)}
    saved = Saved("unet", {"r": 1, "lora_alpha": 1}, tensors)
    with pytest.raises(ValueError, match="no place for 'a.lora_B.bias': write it as peft"):
        write_as(saved, tmp_path, "kohya")
    with pytest.raises(ValueError, match="holds no pytorch_lora_weights.safetensors: give RUN/model"):
        read_saved(tmp_path)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="was not saved here: start a run from it"):
        read_saved(tmp_path)


# -- plain diffusers ------------------------------------------------------------------------------


def start(field: PretrainedField) -> Tensor:
    return torch.randn(1, *field.event_shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def image(field: PretrainedField) -> Tensor:
    """By our sampler."""
    policy = FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=2)
    policy.multiple = 1
    return field.decode(policy.sample(policy.encode(field.tokenize([PROMPT])), x_0=start(field)).final)


def stock_image(field: PretrainedField, pipe: Any) -> Tensor:
    """By a plain diffusers pipeline, from the same noise."""
    settings = {"num_inference_steps": 2, "height": SIDE, "width": SIDE, "output_type": "pt"}
    name, x_0 = type(pipe).__name__, start(field)
    if name == "FluxPipeline":
        return pipe(PROMPT, latents=pack(x_0), max_sequence_length=24, **settings).images
    settings |= {"max_sequence_length": 24} if name == "StableDiffusion3Pipeline" else {}
    return pipe(PROMPT, latents=x_0, guidance_scale=1.0, **settings).images


def two_updates(field: PretrainedField) -> None:
    """Of what trains, towards smaller velocities."""
    weights = [p for p in field.parameters() if p.requires_grad]
    x, t, cond = start(field), torch.tensor([0.5]), field.encode(field.tokenize([PROMPT]))
    for _ in range(2):
        grads = torch.autograd.grad(field(x, t, 0 * t, cond).square().mean(), weights)
        with torch.no_grad():
            for weight, grad in zip(weights, grads, strict=True):
                weight -= 0.05 * grad / grad.norm().clamp(min=1e-12)


def plain_pipe(folder: Path) -> Any:
    from diffusers import DDIMScheduler, DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "unet"):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=True)
    return pipe


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_each_form_goes_on_training_and_gives_its_picture_in_plain_diffusers(
    kind, fields, tiny_pipeline, tmp_path
):
    """Loaded, updated twice, saved; in every form that diffusers reads of this model."""
    from peft import PeftModel

    field = fields(kind)
    tensors = {}
    for layer, parts in lora(field, LAYERS[kind][:2]).items():
        tensors |= {f"{layer}.lora_A.weight": parts["a"][:2], f"{layer}.lora_B.weight": parts["b"][:, :2]}
    saved = Saved(field.adapter.component, {"r": 2, "lora_alpha": 5, "target_modules": list(LAYERS[kind][:2])}, tensors)
    pipe = plain_pipe(tiny_pipeline(kind))
    untuned = stock_image(field, pipe)
    for form in FORMATS:
        begun = write_as(saved, tmp_path / "begun" / form, form)
        tuned = pretrained(str(tiny_pipeline(kind)), resolution=SIDE, adapter=str(begun), **TEXT.get(kind, {}))
        assert ": scale 2.5, of " in tuned.begun_from or (form == "plain" and ": scale 1, of " in tuned.begun_from)
        two_updates(tuned)
        want = image(tuned)
        folder = save_field(tuned, tmp_path / "saved" / form)
        written = write_as(read_saved(folder), tmp_path / "again" / form, form)
        pipe.load_lora_weights(folder)
        found = {"as saved": stock_image(field, pipe)}
        pipe.unload_lora_weights()
        if form == "peft":
            network = getattr(pipe, field.adapter.component)
            setattr(pipe, field.adapter.component, PeftModel.from_pretrained(network, written.parent).base_model.model)
            found[form] = stock_image(field, pipe)
            pipe = plain_pipe(tiny_pipeline(kind))
        elif form == "plain" or kind != "sd3":  # diffusers has no names of kohya's for it
            pipe.load_lora_weights(written.parent, weight_name=written.name)
            found[form] = stock_image(field, pipe)
            pipe.unload_lora_weights()
        for name, picture in found.items():
            torch.testing.assert_close(picture, want, atol=1e-4, rtol=0, msg=f"{form}: {name}")
            assert (picture - untuned).abs().max() > 1e-3


def test_a_saved_file_names_the_network_as_its_pipeline_does(tiny_pipeline, tmp_path):
    field = pretrained(str(tiny_pipeline("sdxl")), resolution=SIDE, lora=2)
    save_field(field, tmp_path)
    assert all(name.startswith("unet.") for name in load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    assert "a LoRA of the unet" in (tmp_path / "README.md").read_text()
