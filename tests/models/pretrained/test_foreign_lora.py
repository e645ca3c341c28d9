"""LoRA files of others: taken whole, with their scale, or refused with the keys that stand in the way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.models.io import load_field, save_field
from rlflow.models.pretrained import lora as lora_files
from rlflow.models.pretrained.foreign_lora import HONOURED, IRRELEVANT
from rlflow.models.pretrained.pipeline import PretrainedField, pretrained

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k")
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture
def load(tiny_pipeline):
    """load(kind, setting=...) -> a field of the tiny checkpoint."""
    return lambda kind, **settings: pretrained(
        str(tiny_pipeline(kind)), resolution=32, max_sequence_length=24, **settings
    )


@torch.no_grad()
def velocity(field: PretrainedField) -> Tensor:
    """At one fixed place."""
    x, t = torch.linspace(-1, 1, 1024).view(1, 4, 16, 16)[..., :8, :8], torch.tensor([0.3])
    return field(x, t, 0 * t, field.encode(field.tokenize(["a cat"])))


def tensors(field: PretrainedField, layers: tuple[str, ...] = LAYERS, rank: int = 2) -> dict[str, Tensor]:
    """LAYER.lora_A.weight, LAYER.lora_B.weight."""
    generator, found = torch.Generator().manual_seed(4), dict(field.transformer.named_modules())
    sizes = {f"{n}.lora_A.weight": (rank, found[n].in_features) for n in layers}
    sizes |= {f"{n}.lora_B.weight": (found[n].out_features, rank) for n in layers}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def merged(field: PretrainedField, lora: dict[str, Tensor], scale: dict[str, float]) -> Tensor:
    """Velocity with W + scale B A in place of W."""
    found = dict(field.transformer.named_modules())
    with torch.no_grad():
        for name, s in scale.items():
            found[name].weight += s * lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
    return velocity(field)


def write(folder: Path, state: dict[str, Tensor], config: dict[str, Any] | None = None, name: str = WEIGHTS) -> str:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / name, {"format": "pt"})
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return str(folder)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


FORMS: dict[str, tuple[str, dict[str, Any] | None, dict[str, float], tuple[float, float]]] = {
    # prefix, adapter_config.json, alpha tensors, scales of the two layers
    "diffusers": ("transformer.", None, {}, (1, 1)),
    "diffusers-alpha": ("transformer.", None, {LAYERS[0]: 0.5, LAYERS[1]: 3.0}, (0.25, 1.5)),
    "diffusers-one-alpha": ("transformer.", None, {LAYERS[0]: 0.5}, (0.25, 1)),
    "of-the-model": ("", None, {}, (1, 1)),
    "peft": ("base_model.model.", {"r": 2, "lora_alpha": 8}, {}, (4, 4)),
    "peft-rslora": ("base_model.model.", {"r": 2, "lora_alpha": 8, "use_rslora": True}, {}, (8 / 2**0.5, 8 / 2**0.5)),
    "peft-pattern": ("base_model.model.", {"r": 2, "lora_alpha": 8, "alpha_pattern": {LAYERS[1]: 3}}, {}, (4, 1.5)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_every_form_keeps_its_scale(kind, form, load, tmp_path):
    """As the merged weights; saved and loaded again, and in float32 beside a base of less."""
    prefix, config, alphas, scales = FORMS[form]
    plain = load(kind)
    lora = tensors(plain)
    told = {f"{name}.alpha": torch.tensor(alpha) for name, alpha in alphas.items()}
    field = load(kind, adapter=write(tmp_path / "a", prefixed(prefix, lora | told), config))
    before = velocity(plain)
    want = merged(plain, lora, dict(zip(LAYERS, scales, strict=True)))
    torch.testing.assert_close(velocity(field), want, atol=1e-5, rtol=1e-4)
    assert (want - before).abs().max() > 1e-3
    save_field(field, tmp_path / "saved")
    torch.testing.assert_close(velocity(load_field(str(tmp_path / "saved"))), velocity(field), rtol=0, atol=0)


def test_what_a_model_of_diffusers_saved_is_read_with_its_settings(load, tmp_path):
    field = load("sd3")
    settings = {"r": 4, "lora_alpha": 10, "use_dora": True, "target_modules": ["attn.to_q"], "init_lora_weights": False}
    field.transformer.add_adapter(LoraConfig(**settings), "default")
    field.transformer.save_lora_adapter(tmp_path)
    torch.testing.assert_close(velocity(load("sd3", adapter=str(tmp_path))), velocity(field), atol=1e-6, rtol=1e-5)


def test_no_bit_of_the_tensors_is_lost_beside_a_base_of_half_precision(load, tmp_path):
    lora = tensors(load("sd3"))
    field = load("sd3", weights="bfloat16", adapter=write(tmp_path / "a", prefixed("transformer.", lora)))
    state = get_peft_model_state_dict(field.transformer)
    assert set(state) == set(lora)
    assert all(torch.equal(state[name], value) for name, value in lora.items())


def test_tensors_that_were_one_train_apart_and_are_saved(load, tmp_path):
    """A fused projection of queries, keys and values gives three layers one lora_A."""
    g = torch.Generator().manual_seed(0)
    name, width = "lora_unet_double_blocks_0_img_attn_qkv", 16
    state = {f"{name}.lora_down.weight": torch.randn(2, width, generator=g), f"{name}.alpha": torch.tensor(1.0)}
    state[f"{name}.lora_up.weight"] = torch.randn(3 * width, 2, generator=g)
    field = load("flux", adapter=write(tmp_path / "a", state))
    found = lora_files.parameters(field.transformer)
    assert len(found) == 6
    assert len({p.untyped_storage().data_ptr() for p in found.values()}) == 6
    assert (velocity(field) - velocity(load("flux"))).abs().max() > 1e-3
    save_field(field, tmp_path / "saved")
    assert torch.equal(velocity(load_field(str(tmp_path / "saved"))), velocity(field))


Q = "transformer.transformer_blocks.0.attn.to_q"
REFUSED = {
    "text": (
        {"text_encoder.layers.0.q_proj.lora_A.weight": 2},
        None,
        "holds LoRA of a text encoder too .*remove those 1",
    ),
    "kohya": ({"lora_transformer_x.lora_down.weight": 2}, None, "'lora_transformer_x.lora_down.weight'.* Convert it"),
    "dora_scale": ({f"{Q}.dora_scale": 2}, None, r"to_q.dora_scale is of shape \(2, 2\), and 16 sizes are wanted"),
    "loha": ({f"{Q}.hada_w1_a": 2}, None, "not known for SD3.*to_q.hada_w1_a'.* Convert it"),
    "alpha": ({"transformer.proj_out.alpha": 0}, None, "has an alpha of 'proj_out' and no lora_A.weight there"),
    "other": ({"transformer.blocks.9.lora_A.weight": 2}, None, "of another model: .* has no layer blocks.9"),
    "base": ({"transformer.proj_out.weight": 2}, None, "not known for .*'transformer.proj_out.weight'.* Convert it"),
    "twice": ({f"{Q}.alpha": 0}, {"r": 2}, "tells its scale in settings and in its tensors"),
    "kind": ({}, {"peft_type": "OFT"}, "it is a OFT, and only LoRA is known"),
    "setting": ({}, {"r": 2, "use_qalora": True}, "it has use_qalora=True, which is not known here"),
    "start": ({}, {"r": 2, "init_lora_weights": "pissa"}, "moved the base as it began"),
    "rank": ({}, {"r": 3}, "the LoRA does not fit SD3Transformer2DModel: .*size mismatch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_taken_in_part_is_refused_by_name(case, load, tmp_path):
    more, config, why = REFUSED[case]
    added = {name: torch.ones((2,) * dims) if dims else torch.tensor(1.0) for name, dims in more.items()}
    state = prefixed("transformer.", tensors(load("sd3"))) if case != "kohya" else {}
    folder = write(tmp_path / "a", state | added, config)
    with pytest.raises(ValueError, match=f"adapter {folder}: .*{why}"):
        load("sd3", adapter=folder)


def test_a_peft_folder_without_its_settings_has_no_scale(load, tmp_path):
    folder = write(
        tmp_path / "a", prefixed("base_model.model.", tensors(load("sd3"))), name="adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match=r"lacks adapter_config\.json, where peft wrote the scale"):
        load("sd3", adapter=folder)


def test_what_is_no_adapter_is_said(load, tmp_path):
    with pytest.raises(ValueError, match="it is no folder and no .safetensors file"):
        load("sd3", adapter=str(tmp_path / "a/b/c"))
    with pytest.raises(ValueError, match="should hold one .safetensors file, and holds none"):
        load("sd3", adapter=str(tmp_path))
    for name in ("a.safetensors", "b.safetensors"):
        write(tmp_path, {"x": torch.ones(1)}, name=name)
    with pytest.raises(ValueError, match=r"holds several: name one of \['a.safetensors', 'b.safetensors'\]"):
        load("sd3", adapter=str(tmp_path))
    (tmp_path / "a.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="a.safetensors cannot be read"):
        load("sd3", adapter=str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("damage", ["lacks", "brings", "nan"])
def test_our_own_is_taken_whole_or_not_at_all(damage, load, tmp_path):
    save_field(load("sd3", lora=2), tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    name = sorted(state)[0]
    if damage == "lacks":
        del state[name]
    else:
        state[name if damage == "nan" else "transformer.nowhere.lora_A.weight"] = torch.full_like(
            state[name], torch.nan
        )
    save_file(state, tmp_path / WEIGHTS)
    why = {"lacks": "lacks 1 tensors", "brings": "brings 1 of no layer", "nan": "lora_A.* inf or nan"}[damage]
    field = load("sd3", lora=2)
    if damage == "brings":  # not by its values
        save_file(state | {"transformer.nowhere.lora_A.weight": torch.ones(2, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=why):
        field.load_weights(tmp_path)


def test_dropout_of_an_adapter_is_not_active(load, tmp_path):
    """Two passes over one input are equal, before and after a policy is made; the tensors are as without it."""
    config = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.5}
    field = load("sd3", adapter=write(tmp_path / "a", prefixed("transformer.", tensors(load("sd3"))), config))
    assert torch.equal(velocity(field), velocity(field))
    assert not any(module.training for module in FlowPolicy(field.train(), FlowSDE()).modules())


def test_the_settings_that_are_named_are_those_of_peft():
    assert not set(HONOURED) & IRRELEVANT
    assert set(HONOURED) | IRRELEVANT <= set(LoraConfig().to_dict())


@pytest.mark.parametrize("modules", [["attn.to_q", "no_such"], ["norm1"], []])
def test_modules_that_name_no_layer_are_refused(modules, load):
    with pytest.raises(
        ValueError, match=r"lora_modules(: no layer of SD3Transformer2DModel ends in .*; some: | names no)"
    ):
        load("sd3", lora=2, lora_modules=modules)


def test_settings_of_a_lora_without_one_are_refused(load):
    with pytest.raises(ValueError, match="the whole network trains: set lora too"):
        load("sd3", lora_alpha=3.0)
