"""A model as shapes: a local folder's are those of the pipeline that is loaded, published ones have published sizes."""

import json
import shutil

import pytest
import torch

from rlflow.models.pretrained.known import known
from rlflow.models.pretrained.pipeline import pretrained
from rlflow.models.pretrained.shapes_of import beside, encoder_bytes, quantised_saving, shape_of


def shapes(module):
    """Shape, type and role of every tensor, by name."""
    return {n: (p.shape, p.dtype, p.requires_grad) for n, p in [*module.named_parameters(), *module.named_buffers()]}


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": 4, "weights": "bfloat16"}, {"resolution": 64, "max_sequence_length": 16, "lora": 2}],
    ids=["whole", "lora", "settings"],
)
@pytest.mark.parametrize("kind", ["sd3", "flux", "klein", "z_image", "qwen_image", "wan", "sd15", "sdxl"])
def test_a_local_pipeline_has_the_shapes_of_the_loaded_one(kind, settings, tiny_pipeline):
    folder = str(tiny_pipeline(kind))
    if kind in ("sd15", "sdxl"):
        settings = {name: value for name, value in settings.items() if name != "max_sequence_length"}
    elif kind != "sd3":
        settings = {"resolution": 32, **settings}  # their own is 128 latents a side, whatever the folder says
    shape, loaded = shape_of(folder, settings), pretrained(folder, **settings)
    assert shapes(shape) == shapes(loaded)
    assert shapes(beside(shape)[0]) == shapes(loaded.adapter.pipe.vae)
    assert all(p.is_meta for p in shape.parameters())
    assert shape.event_shape == loaded.event_shape
    assert torch.equal(shape.times(10), loaded.times(10))
    rows = loaded.tokenize(["a cat"])
    text, real = shape.table(rows), loaded.table(rows)
    if loaded.ragged:  # of as many tokens as it may have
        text["tokens"] = text["tokens"][:, : real["tokens"].shape[1]]
    assert {name: v.shape for name, v in text.items()} == {name: v.shape for name, v in real.items()}
    encoders = [getattr(loaded.adapter.pipe, name) for name in loaded.adapter.encoders]
    assert encoder_bytes(shape) == sum(p.numel() * p.element_size() for e in encoders for p in e.parameters())


def test_an_encoder_that_a_folder_lacks_counts_nothing(tiny_pipeline, tmp_path):
    """Stable Diffusion 3 is often used without its T5."""
    folder = shutil.copytree(tiny_pipeline("sd3"), tmp_path / "small")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_3"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert set(known(str(folder)).encoders) == {"text_encoder", "text_encoder_2"}


def test_a_folder_that_is_not_whole_is_refused(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline("sd3"), tmp_path / "part")
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"vae/config.json is missing"):
        known(str(folder))


@pytest.mark.parametrize(
    ("checkpoint", "billions"),
    [
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2.03),
        ("stabilityai/stable-diffusion-3.5-medium", 2.24),
        ("stabilityai/stable-diffusion-3.5-large", 8.06),
        ("stabilityai/stable-diffusion-3.5-large-turbo", 8.06),
        ("black-forest-labs/FLUX.1-dev", 11.90),
        ("black-forest-labs/FLUX.1-schnell", 11.89),
        ("black-forest-labs/FLUX.2-dev", 32.22),
        ("black-forest-labs/FLUX.2-klein-base-4B", 3.88),
        ("black-forest-labs/FLUX.2-klein-base-9B", 9.08),
        ("Tongyi-MAI/Z-Image", 6.15),
        ("Qwen/Qwen-Image-2512", 20.43),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1.42),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 14.29),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 0.86),
        ("stabilityai/stable-diffusion-2-1", 0.87),
        ("stabilityai/stable-diffusion-xl-base-1.0", 2.57),
    ],
)
def test_published_models_have_their_published_sizes(checkpoint, billions):
    found = sum(p.numel() for p in shape_of(checkpoint, {}).parameters()) / 1e9
    assert found == pytest.approx(billions, abs=0.01)


def test_only_dev_takes_guidance_as_an_input():
    dev, schnell = (shape_of(f"black-forest-labs/FLUX.1-{name}", {}) for name in ("dev", "schnell"))
    assert (dev.transformer.config.guidance_embeds, schnell.transformer.config.guidance_embeds) == (True, False)
    assert torch.allclose(schnell.times(4), torch.linspace(0, 1, 5).double())
    assert not torch.allclose(dev.times(4), schnell.times(4))


def test_a_quantised_base_counts_its_linear_layers_with_fewer_bits():
    """Of klein 4B, nearly all of it, but for the largest layer, which is made whole where it runs."""
    name = "black-forest-labs/FLUX.2-klein-base-4B"
    found = [quantised_saving(shape_of(name, {"weights": "bfloat16", "lora": 4, "quantize": q})) for q in (None, "nf4")]
    largest = 3072 * 9 * 3072  # q, k, v and twice three of the MLP
    assert found[0] == 0
    assert found[1] == pytest.approx(3.8755e9 * (2 - 4.5 / 8) - 2 * largest, rel=1e-3)


@pytest.mark.parametrize(("name", "is_distilled"), [("klein-4B", True), ("klein-base-4B", False)])
def test_klein_and_its_base_differ_in_what_they_were_distilled_to(name, is_distilled):
    field = shape_of(f"black-forest-labs/FLUX.2-{name}", {})
    assert (field.distilled is not None) == is_distilled
    assert (field.adapter.num_steps, field.adapter.guidance) == ((4, 1.0) if is_distilled else (50, 4.0))
