"""What trains on a foreign checkpoint, what a checkpoint of the run holds, and what plain diffusers reads of it."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rlflow as rf
from rlflow.flow.grid import FromScheduler
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.models.io import load_field, save_field
from rlflow.models.pretrained import lora as lora_files
from rlflow.models.pretrained.families.packing import pack
from rlflow.models.pretrained.pipeline import PretrainedField, pretrained

SIDE, LENGTH = 32, 24
PROMPT = "a red cat"
KINDS = ["sd3", "flux"]


@pytest.fixture
def load(tiny_pipeline):
    """load(kind, setting=...) -> a field of the tiny checkpoint."""

    def load(kind: str, **settings: Any) -> PretrainedField:
        return pretrained(str(tiny_pipeline(kind)), **{"resolution": SIDE, "max_sequence_length": LENGTH, **settings})

    return load


def velocity(field: PretrainedField) -> torch.Tensor:
    """At one fixed place."""
    x = torch.randn(2, *field.event_shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.2, 0.7])
    return field(x, t, 0 * t, field.encode(field.tokenize([PROMPT] * 2)))


def trained(field: PretrainedField) -> PretrainedField:
    """Every trainable parameter moved, as by training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in field.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return field


def image(field: PretrainedField) -> torch.Tensor:
    """By our sampler."""
    policy = FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=3)
    with torch.no_grad():
        chain = policy.sample(policy.encode(field.tokenize([PROMPT])), x_0=start(field))
        return field.decode(chain.final)


def start(field: PretrainedField) -> torch.Tensor:
    return torch.randn(1, *field.event_shape, generator=torch.Generator().manual_seed(3))


def stock_image(field: PretrainedField, pipe: Any) -> torch.Tensor:
    """By a plain diffusers pipeline, from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "height": SIDE, "width": SIDE, "max_sequence_length": LENGTH}
    x_0 = start(field)
    if type(field.adapter).__name__ == "SD3":
        settings |= {"guidance_scale": 1.0}
    else:
        x_0 = pack(x_0)
    return pipe(PROMPT, latents=x_0, output_type="pt", **settings).images


# -- what trains ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_trains_alone_and_begins_as_the_base(kind, load):
    base, field = load(kind), load(kind, lora=3)
    names = {n for n, p in field.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in n for n in names)
    ranks = {p.shape[0] for n, p in field.named_parameters() if "lora_A" in n}
    assert ranks == {3}
    torch.testing.assert_close(velocity(field), velocity(base), rtol=0, atol=0)


def test_the_reference_is_the_adapter_switched_off_and_no_weight_set_holds_the_base(load):
    field = load("sd3", lora=3)
    policy = FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=3)
    policy.weights.snapshot("ref")
    policy.weights.snapshot("ema")
    trained(field)
    live = velocity(field)
    with policy.using("ref"):
        reference = velocity(field)
    field.transformer.disable_adapters()
    torch.testing.assert_close(reference, velocity(field), rtol=0, atol=0)
    field.transformer.enable_adapters()
    torch.testing.assert_close(velocity(field), live, rtol=0, atol=0)
    assert (live - reference).abs().max() > 1e-3
    policy.weights.blend("ema", 0.9)
    for name in ("ref", "ema"):
        assert set(policy.weights.sets[name]) == {f"field.{n}" for n in lora_files.parameters(field)}


def test_a_checkpoint_of_a_lora_run_holds_the_lora_only(load):
    field, other = trained(load("sd3", lora=3)), load("sd3", lora=3)
    policy, fresh = (FlowPolicy(f, FlowSDE(), grid=FromScheduler(f), num_steps=3) for f in (field, other))
    state = policy.state_dict()
    assert {n for n in state if n.startswith("field.")} == {f"field.{n}" for n in lora_files.parameters(field)}
    fresh.load_state_dict(state)
    torch.testing.assert_close(velocity(other), velocity(field), rtol=0, atol=0)
    state.pop(next(n for n in state if "lora_" in n))
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict(state)


def test_a_base_in_bfloat16_keeps_its_lora_and_its_chain_in_float32(load):
    field = load("sd3", lora=3, weights="bfloat16")
    assert {p.dtype for p in lora_files.parameters(field).values()} == {torch.float32}
    assert field.weight_dtype == torch.bfloat16
    assert next(field.adapter.pipe.vae.parameters()).dtype == torch.float32
    policy = FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=3, autocast=torch.bfloat16)
    cond = policy.encode(field.tokenize([PROMPT] * 2))
    x, t = torch.randn(2, *field.event_shape), torch.tensor([0.2, 0.2])
    dist = policy.transition(x, t, t + 0.1, cond)
    assert (dist.mean.dtype, dist.log_prob(x, "mean").dtype) == (torch.float32, torch.float32)
    dist.mean.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora_files.parameters(field).values())


def test_full_training_in_half_precision_is_refused(load):
    with pytest.raises(ValueError, match="the whole network trains in float32 only .*: set lora=32"):
        load("sd3", weights="bfloat16")
    with pytest.raises(ValueError, match="leave lora out"):
        load("sd3", lora=3, adapter="somewhere")
    with pytest.raises(ValueError, match="leave lora_alpha and lora_modules out"):
        load("sd3", lora_alpha=3.0, adapter="somewhere")
    with pytest.raises(ValueError, match="no layer of SD3Transformer2DModel ends in 'nowhere'"):
        load("sd3", lora=3, lora_modules=["nowhere"])


def count_calls(module: torch.nn.Module) -> list[int]:
    """A list that grows by an entry at each call of the module."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_give_the_same_gradient(kind, load):
    """And every block does run once more in the backward pass."""
    grads = []
    for on in (False, True):
        torch.manual_seed(0)  # a LoRA's A is drawn
        field = trained(load(kind, lora=2))
        field.grad_checkpointing = on
        assert field.grad_checkpointing is on
        blocks = [m for m in field.transformer.modules() if type(m).__name__.endswith("TransformerBlock")]
        counts = [count_calls(block) for block in blocks]
        velocity(field).square().mean().backward()
        assert [len(calls) for calls in counts] == [2 if on else 1] * 2
        grads.append([p.grad for p in lora_files.parameters(field).values()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_quantiser_is_named(kind, package, load, monkeypatch):
    load("sd3")  # diffusers looks for quantisers once, when it first needs them, and must not remember this test
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"^quantize={kind} needs {package} \(.*\): pip install {package}$"):
        load("sd3", lora=3, quantize=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_an_int8_base_has_nearly_the_velocity_and_the_gradient_of_the_base(kind, load):
    pytest.importorskip("torchao")
    velocities, grads = [], []
    for quantize in (None, "int8"):
        torch.manual_seed(0)  # a LoRA's A is drawn
        field = trained(load(kind, lora=3, quantize=quantize))
        velocities.append(found := velocity(field))
        found.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in lora_files.parameters(field).values()]))
    for plain, quantised in (velocities, grads):
        assert 1e-4 < (quantised - plain).norm() / plain.norm() < 0.05


# -- what is saved --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_lora_gives_the_same_image_in_plain_diffusers(kind, load, tiny_pipeline, tmp_path):
    from diffusers import DiffusionPipeline

    field = trained(load(kind, lora=3, lora_alpha=5.0))
    save_field(field, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"pytorch_lora_weights.safetensors", "README.md", "config.json"}
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline(kind))
    untuned = stock_image(field, pipe)
    pipe.load_lora_weights(tmp_path)
    tuned = stock_image(field, pipe)
    torch.testing.assert_close(tuned, image(field), atol=1e-5, rtol=1e-4)
    assert (tuned - untuned).abs().max() > 1e-3, "the LoRA does something"


def test_a_saved_lora_loads_again_and_is_a_start(load, tmp_path):
    field = trained(load("sd3", lora=3, lora_alpha=5.0))
    save_field(field, tmp_path)
    torch.testing.assert_close(velocity(load_field(str(tmp_path))), velocity(field), rtol=0, atol=0)
    policy = rf.load(tmp_path)
    assert torch.equal(policy.plan().t, field.times(28))
    start = load("sd3", adapter=str(tmp_path))
    torch.testing.assert_close(velocity(start), velocity(field), rtol=1e-6, atol=1e-6)
    assert {n for n, p in start.named_parameters() if p.requires_grad} == set(lora_files.parameters(start))


def foreign_lora(pipe: Any, folder: Path, ranks: dict[str, int], **settings: Any) -> None:
    """A LoRA of random weights with a rank for each layer that is named in full; by plain diffusers."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    layers = "|".join(ranks)
    config = LoraConfig(target_modules=f"({layers})", rank_pattern=ranks, init_lora_weights=False, **settings)
    pipe.transformer.add_adapter(config, "default")
    told = _collate_lora_metadata({"transformer": pipe.transformer}) if settings else {}
    type(pipe).save_lora_weights(folder, get_peft_model_state_dict(pipe.transformer), **told)


FOREIGN = {
    "ranks": {},  # of files that tell no alpha, each layer's is its rank
    "alphas": {"lora_alpha": 5, "alpha_pattern": {"transformer_blocks.0.attn.to_q": 1.5}},
    "dora": {"use_dora": True, "use_rslora": True},
}


@pytest.mark.parametrize("settings", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("kind", KINDS)
def test_what_began_as_another_lora_needs_it_no_more(kind, settings, load, tiny_pipeline, tmp_path, monkeypatch):
    """Whatever its shape, layer by layer: the final `proj_out` alone, and not every layer whose name ends so."""
    from diffusers import DiffusionPipeline

    ranks = {"transformer_blocks.0.attn.to_q": 2, "transformer_blocks.0.attn.to_k": 3, "proj_out": 4}
    foreign_lora(DiffusionPipeline.from_pretrained(tiny_pipeline(kind)), tmp_path / "first", ranks, **settings)
    monkeypatch.chdir(tmp_path)
    begun = load(kind, adapter="first", weights="bfloat16")
    assert {p.shape[0] for n, p in begun.named_parameters() if "lora_A" in n} == {2, 3, 4}
    field = trained(begun)
    assert (velocity(field) - velocity(load(kind, weights="bfloat16", lora=2))).abs().max() > 1e-2
    save_field(field, tmp_path / "saved")
    shutil.rmtree("first")
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = load_field(str(tmp_path / "moved"))
    assert set(lora_files.parameters(again)) == set(lora_files.parameters(field))
    assert torch.equal(velocity(again), velocity(field))
    assert (tmp_path / "moved/config.json").read_text() == (save_field(again, tmp_path) / "config.json").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_wholly_tuned_network_is_a_diffusers_transformer(kind, load, tiny_pipeline, tmp_path):
    import diffusers

    field = trained(load(kind))
    save_field(field, tmp_path)
    plain = {"sd3": diffusers.SD3Transformer2DModel, "flux": diffusers.FluxTransformer2DModel}[kind]
    transformer = plain.from_pretrained(tmp_path, subfolder="transformer")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_pipeline(kind), transformer=transformer)
    torch.testing.assert_close(stock_image(field, pipe), image(field), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(velocity(load_field(str(tmp_path))), velocity(field), rtol=0, atol=0)


def test_the_model_card_says_what_it_is_and_how_it_loads(load, tiny_pipeline, tmp_path):
    save_field(load("flux", lora=3), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert 'pipe.load_lora_weights("THIS_FOLDER")' in card
    assert "lora=3" in card
    assert "base_model:" not in card, "a folder of this machine is no name on the hub"
    hub = lora_files.model_card("FluxPipeline", "FluxTransformer2DModel", False, {"checkpoint": "owner/model"})
    assert "base_model: owner/model" in hub
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "pretrained"


def test_push_uploads_the_folder(load, tmp_path, monkeypatch):
    said: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
            said.append((name, private))

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            said.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    field = load("sd3", lora=2)
    policy = FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=3)
    rf.save(policy, tmp_path, push="owner/name")
    files = ["README.md", "config.json", "pytorch_lora_weights.safetensors"]
    assert said == [("owner/name", True), ("owner/name", files)]
