"""LoRA files of Wan as others name it, read and written: the same product in every form, the same video in diffusers."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlflow.models.io import save_field
from rlflow.models.pretrained import lora as lora_files
from rlflow.models.pretrained.foreign_lora import read_lora
from rlflow.models.pretrained.lora_formats import FORMATS, read_saved, write_as
from rlflow.models.pretrained.pipeline import PretrainedField, pretrained
from tests.models.pretrained.families.test_wan import SIZES, Stock
from tests.models.pretrained.test_lora_formats import delta, deltas, plain_pipe, two_updates

ATTENTION = {
    f"{theirs}.{short}": f"{ours}.{layer}"
    for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for short, layer in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
}
WHOLE = ATTENTION | {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
"""Layers of a block as Wan's first release names them, and as diffusers does."""


@pytest.fixture(scope="module")
def field(tiny_pipeline) -> PretrainedField:
    """Not to be changed."""
    return pretrained(str(tiny_pipeline("wan")), **SIZES)


def products(field: PretrainedField, layers: dict[str, str]) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """(A, B) of rank 2 by block and name of the first release."""
    modules, generator = dict(field.transformer.named_modules()), torch.Generator().manual_seed(5)
    found = {}
    for i in range(2):
        for theirs, ours in layers.items():
            out, into = modules[f"blocks.{i}.{ours}"].weight.shape
            a, b = torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator)
            found[i, theirs] = a, b
    return found


FORMS = {
    # layers, name of a layer, ends of the two tensors, bars for dots, alpha
    "ComfyUI": (ATTENTION, "diffusion_model.blocks.{}.{}", ("lora_A.weight", "lora_B.weight"), False, None),
    "ComfyUI-alpha": (WHOLE, "diffusion_model.blocks.{}.{}", ("lora_down.weight", "lora_up.weight"), False, 0.5),
    "musubi": (WHOLE, "lora_unet_blocks_{}_{}", ("lora_down.weight", "lora_up.weight"), True, 3.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_names_of_its_first_release_give_the_same_product(form, field, tmp_path):
    """Diffusers' converter scales tensors where they lie, which is no loss of them."""
    layers, stem, ends, bars, alpha = FORMS[form]
    state, want = {}, {}
    for (i, theirs), (a, b) in products(field, layers).items():
        name = stem.format(i, theirs.replace(".", "_") if bars else theirs)
        state |= {f"{name}.{ends[0]}": a, f"{name}.{ends[1]}": b}
        state |= {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
        want[f"blocks.{i}.{layers[theirs]}"] = delta(a, b, 1.0 if alpha is None else alpha / 2)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "a.safetensors")
    found = read_lora(str(tmp_path / "a.safetensors"), field.adapter)
    torch.testing.assert_close(deltas(found), want)
    multiplied = "the file's alpha tensors, which diffusers' converter multiplied in"
    assert found.scale_from == ("no place in the file: alpha is the rank" if alpha is None else multiplied)


def test_layers_that_the_converter_does_not_know_are_refused(field, tmp_path):
    state = {f"diffusion_model.blocks.0.modulation.{end}.weight": torch.ones(2, 2) for end in ("lora_A", "lora_B")}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"keys .*modulation|no layer .*modulation"):
        read_lora(str(tmp_path / "a.safetensors"), field.adapter)


def test_what_was_trained_is_written_in_every_form_and_plain_diffusers_shows_it(field, tiny_pipeline, tmp_path):
    """Of names with bars diffusers knows those of the first release alone."""
    tuned = pretrained(str(tiny_pipeline("wan")), lora=2, **SIZES)
    with torch.no_grad():
        for parameter in lora_files.parameters(tuned.transformer).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    two_updates(tuned)
    saved = read_saved(save_field(tuned, tmp_path / "saved"))
    for form in FORMATS:
        found = read_lora(str(write_as(saved, tmp_path / form, form)), field.adapter)
        torch.testing.assert_close(deltas(found), deltas(read_lora(str(tmp_path / "saved"), field.adapter)))
    pipe, x_0 = plain_pipe(tiny_pipeline("wan")), torch.randn(1, *tuned.event_shape)
    untuned = Stock(pipe, tuned).theirs(x_0, 1.0, "pt", 2)
    with torch.no_grad():
        want = tuned.decode(Stock(pipe, tuned).ours(x_0, 1.0, num_steps=2))
    for folder in ("saved", "plain"):
        pipe.load_lora_weights(tmp_path / folder)
        video = Stock(pipe, tuned).theirs(x_0, 1.0, "pt", 2)
        pipe.unload_lora_weights()
        torch.testing.assert_close(video, want, atol=1e-4, rtol=0, msg=folder)
        assert (video - untuned).abs().max() > 1e-3
