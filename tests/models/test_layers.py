"""Norms of a pretrained network: the same function in one precision; linear layers: a row alike in any company."""

import math

import pytest
import torch
import torch.nn as nn
from diffusers.models import normalization

from rlflow.cost.trace import as_on_gpu
from rlflow.models import layers
from rlflow.models.pretrained.lora import _OutsideAutocast
from rlflow.models.pretrained.pipeline import pretrained

KINDS = {
    "layer": lambda: nn.LayerNorm(64, eps=1e-6),
    "layer, no weights": lambda: nn.LayerNorm(64, eps=1e-6, elementwise_affine=False),
    "rms of torch": lambda: nn.RMSNorm(64, eps=1e-3),
    "rms of diffusers": lambda: normalization.RMSNorm(64, eps=1e-3),
    "rms, no weights": lambda: normalization.RMSNorm(64, eps=1e-3, elementwise_affine=False),
}


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    """A network of one norm with random weights, as it was and fused."""
    was, fused = nn.Sequential(KINDS[kind]()), nn.Sequential(KINDS[kind]())
    for parameter in was.parameters():
        nn.init.normal_(parameter)
    layers.fuse(fused)
    fused.load_state_dict(was.state_dict())
    assert type(fused[0]) is not type(was[0])
    return was, fused


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_norm_is_the_same_function(kind):
    was, fused = pair(kind)
    x = 0.1 * torch.randn(5, 7, 64)  # small: eps counts
    torch.testing.assert_close(fused(x), was(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_it_keeps_the_dtype_it_is_given_and_rounds_once(kind, device):
    """Relative error of at most half a unit of bfloat16, 2^-8, against float64."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    fused = pair(kind)[1].to(device, torch.bfloat16)
    x = torch.randn(5, 7, 64).to(device, torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        found = fused(x)
    assert found.dtype == torch.bfloat16
    exact = fused.double()(x.double())
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_off_where_the_kernel_runs(kind, monkeypatch):
    """A CPU's autocast leaves norms alone, a GPU's does not: what the kernel is called under tells on both."""
    fused, seen = pair(kind)[1], []
    name = "layer_norm" if "layer" in kind else "rms_norm"
    kernel = getattr(nn.functional, name)

    def spy(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return kernel(x, *args, **kwargs)

    monkeypatch.setattr(nn.functional, name, spy)
    with torch.autocast("cpu", torch.bfloat16):
        fused(torch.randn(2, 64))
    assert seen == [False]


@pytest.mark.parametrize("kind", ["layer", "rms of torch", "rms of diffusers"])
def test_a_small_step_of_a_float32_weight_is_not_lost_in_bfloat16(kind):
    """From 1 to 1.001, a quarter of what bfloat16 can say: the mean output follows, to a tenth of the step."""
    x = torch.randn(64, 64).to(torch.bfloat16)
    outs = []
    for value in (1.0, 1.001):
        fused = nn.Sequential(KINDS[kind]())
        layers.fuse(fused)
        nn.init.constant_(fused[0].weight, value)
        with torch.autocast("cpu", torch.bfloat16):
            outs.append(fused(x))
    assert outs[1].dtype == torch.bfloat16
    ratio = float(outs[1].detach().double().abs().mean() / outs[0].detach().double().abs().mean())
    assert ratio == pytest.approx(1.001, abs=1e-4)


@pytest.mark.parametrize(
    "norm", [normalization.RMSNorm(8, eps=1e-6, bias=True), nn.RMSNorm((3, 8)), normalization.RMSNorm((3, 8), eps=1e-6)]
)
def test_a_norm_of_another_kind_stays(norm):
    """With a bias, or over two axes."""
    net, kind = nn.Sequential(norm), type(norm)
    layers.fuse(net)
    assert type(net[0]) is kind


@pytest.mark.parametrize("shape", [(1,), (3,), (15,), (2, 5), (1, 1)])
def test_a_row_has_the_same_product_however_few_stand_beside_it(shape):
    """To the bit, and with the gradient of those rows alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96))
    plain = nn.Linear(64, 96)
    plain.load_state_dict(net[0].state_dict())
    layers.fill_up(net)
    many = torch.randn(64, 64)
    num = math.prod(shape)
    few = many[:num].view(*shape, 64).requires_grad_()
    assert torch.equal(net(few).flatten(0, -2), net(many)[:num])
    net(few).square().sum().backward()
    got = few.grad
    few.grad = None
    plain(few).square().sum().backward()
    torch.testing.assert_close(got, few.grad)
    torch.testing.assert_close(net[0].weight.grad, plain.weight.grad)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_lora_casts_its_input_unless_autocast_does(device, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda asked: asked == device)
    assert not _OutsideAutocast()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda asked: False)
    assert _OutsideAutocast()


def test_plain_norms_can_be_traced():
    """A model of one's own with torch's RMSNorm, whose eps is its fourth argument."""
    x = torch.randn(2, 8)
    for norm in (nn.RMSNorm(8), nn.RMSNorm(8, eps=1e-6)):
        with as_on_gpu():
            assert norm(x).shape == x.shape


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_under_autocast_no_activation_is_kept_in_float32(kind, tiny_pipeline):
    """Neither by the norms nor by the LoRA, whose own weights are float32."""
    field = pretrained(str(tiny_pipeline(kind)), resolution=32, max_sequence_length=24, lora=2, weights="bfloat16")
    x, t = torch.randn(8, *field.event_shape), torch.full((8,), 0.5)
    cond = field.encode(field.tokenize(["a red cat"] * 8))
    kept = {torch.bfloat16: 0, torch.float32: 0}

    def note(value: torch.Tensor) -> torch.Tensor:
        row_sums = value.dim() == 3 and value.shape[1] == 2  # of attention's two heads
        if value.shape[:1] == (8,) and value.dim() > 2 and not row_sums:
            kept[value.dtype] += 1
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda v: v)
    with as_on_gpu(), hooks, torch.autocast("cpu", torch.bfloat16):
        field(x, t, 0 * t, cond)
    assert kept[torch.bfloat16] > 10
    assert not kept[torch.float32]


def test_under_autocast_the_layers_that_share_an_input_keep_it_once(tiny_pipeline):
    """As with peft's own cast to float32 and back, to the bit, from fewer bytes."""
    field = pretrained(str(tiny_pipeline("sd3")), resolution=32, max_sequence_length=24, lora=2, weights="bfloat16")
    x, t = torch.randn(8, *field.event_shape), torch.full((8,), 0.5)
    cond = field.encode(field.tokenize(["a red cat"] * 8))

    def run() -> tuple[torch.Tensor, int]:
        kept: dict[int, torch.Tensor] = {}

        def note(value: torch.Tensor) -> torch.Tensor:
            return kept.setdefault(value.untyped_storage().data_ptr(), value)

        with torch.autograd.graph.saved_tensors_hooks(note, lambda v: v), torch.autocast("cpu", torch.bfloat16):
            out = field(x, t, 0 * t, cond)
        return out, sum(value.untyped_storage().nbytes() for value in kept.values())

    ours, our_bytes = run()
    for module in field.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = True
    theirs, their_bytes = run()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert our_bytes < 0.95 * their_bytes


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_lora_in_float32_runs_without_autocast_too(weights, tiny_pipeline):
    """Where peft has to bring inputs to its dtype, it still does."""
    field = pretrained(str(tiny_pipeline("sd3")), resolution=32, max_sequence_length=24, lora=2, weights=weights)
    x, t = torch.randn(2, *field.event_shape), torch.full((2,), 0.5)
    assert field(x, t, 0 * t, field.encode(field.tokenize(["a red cat"] * 2))).isfinite().all()


def test_a_dora_keeps_the_cast_that_its_norms_are_computed_after(tiny_pipeline, tmp_path):
    from diffusers import DiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    folder = str(tiny_pipeline("sd3"))
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"], use_dora=True))
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    field = pretrained(folder, resolution=32, max_sequence_length=24, adapter=str(tmp_path))
    layers = [m for m in field.modules() if getattr(m, "lora_variant", None)]
    assert layers
    assert all(layer.cast_input_dtype_enabled is True for layer in layers)
