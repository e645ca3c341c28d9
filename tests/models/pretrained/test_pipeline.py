"""Foreign checkpoints: the border, and that our chain gives the latents of the stock pipeline."""

import inspect
from dataclasses import dataclass
from types import SimpleNamespace
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
from rlflow.models import hub
from rlflow.models.pretrained import scheduler
from rlflow.models.pretrained.families.flux import Flux
from rlflow.models.pretrained.families.sd3 import SD3
from rlflow.models.pretrained.pipeline import PretrainedField, pretrained
from rlflow.models.pretrained.shapes_of import shape_of
from rlflow.models.pretrained.tiny import make_tiny

SIDE, LENGTH, STEPS = 32, 24, 6
PROMPTS = ["a red cat", "two dogs in front of a very long house with many windows, at night, and a third dog"]
SHIFTS = {"static": {"use_dynamic_shifting": False}, "dynamic": {"use_dynamic_shifting": True}}


@dataclass
class Stock:
    """A stock pipeline and our field of the same folder."""

    pipe: Any
    field: PretrainedField

    def theirs(self, x_0: Tensor, guidance: float) -> Tensor:
        """Latents of the stock pipeline from the noise x_0."""
        settings = {"num_inference_steps": STEPS, "height": SIDE, "width": SIDE, "max_sequence_length": LENGTH}
        if isinstance(self.field.adapter, SD3):
            call = self.pipe(PROMPTS, latents=x_0, guidance_scale=guidance, output_type="latent", **settings)
            return call.images
        flux = self.field.adapter
        negative = [""] * len(PROMPTS) if guidance > 1 else None
        settings |= {"negative_prompt": negative, "true_cfg_scale": guidance, "guidance_scale": 3.5}
        out = self.pipe(PROMPTS, latents=flux.pack(x_0), output_type="latent", **settings).images
        return flux.unpack(out, x_0.shape[2] // 2, x_0.shape[3] // 2)

    def ours(self, x_0: Tensor, guidance: float, grid: Any = None) -> Tensor:
        """Latents of our ODE."""
        field = CFG(self.field, guidance) if guidance > 1 else self.field
        policy = FlowPolicy(field, FlowSDE(), grid=grid or FromScheduler(self.field), num_steps=STEPS)
        with torch.no_grad():
            return policy.sample(policy.encode(self.field.tokenize(PROMPTS)), x_0=x_0).final

    def distance(self, guidance: float, ours: float | None = None, grid: Any = None) -> float:
        """|ours - theirs| / |theirs|."""
        x_0 = torch.randn(2, *self.field.event_shape)
        theirs = self.theirs(x_0, guidance)
        return float((self.ours(x_0, ours or guidance, grid) - theirs).norm() / theirs.norm())


STOCK = [*((m, s) for m in ("sd3", "flux") for s in SHIFTS), ("flux_schnell", "static")]


@pytest.fixture(scope="module", params=STOCK, ids="-".join)
def stock(request, tiny_pipeline) -> Stock:
    from diffusers import DiffusionPipeline

    model, shift = request.param
    folder = tiny_pipeline(model, **SHIFTS[shift])
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return Stock(pipe, pretrained(str(folder), resolution=SIDE, max_sequence_length=LENGTH).requires_grad_(False))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_our_ode_gives_the_latents_of_the_stock_pipeline(stock, guidance):
    assert stock.distance(guidance) < 1e-5


class ByOne:
    """The pipeline's grid of one more step, less its second entry."""

    def __init__(self, field: PretrainedField):
        self.field = field

    def __call__(self, num_steps: int) -> Tensor:
        t = self.field.times(num_steps + 1)
        return torch.cat([t[:1], t[2:]])


def test_parity_sees_a_grid_shifted_by_one_entry(stock):
    assert stock.distance(1.0, grid=ByOne(stock.field)) > 1e-3


def test_parity_sees_guidance_that_is_ten_percent_off(stock):
    assert stock.distance(4.5, ours=4.95) > 1e-3


def test_parity_sees_a_timestep_that_is_truncated(stock, monkeypatch):
    adapter = stock.field.adapter
    predict = adapter.predict
    monkeypatch.setattr(adapter, "predict", lambda x, sigma, text: predict(x, (1000 * sigma).long() / 1000, text))
    assert stock.distance(1.0) > 1e-5


# -- the border -----------------------------------------------------------------------------------


@dataclass
class Knows:
    """A network that knows the data, and answers noise - data at timestep = scale * sigma."""

    data: Tensor
    scale: float
    config = SimpleNamespace(guidance_embeds=True)

    def __call__(self, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        sigma = (timestep / self.scale).view(-1, *[1] * (self.data.ndim - 1))
        return ((hidden_states - self.data) / sigma,)


@pytest.mark.parametrize("family", [SD3, Flux])
def test_border_a_network_that_knows_the_data_gives_the_velocity_of_the_path(family):
    """x + (1 - t) v == data, with the family's own scale of time."""
    adapter = family(SimpleNamespace())
    x_0, data = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = torch.lerp(x_0, data, t.view(-1, 1, 1, 1))
    adapter.pipe.transformer = Knows(data, 1000.0) if family is SD3 else Knows(adapter.pack(data), 1.0)
    v = -adapter.predict(x, 1 - t, {"tokens": torch.zeros(3, 5, 8), "pooled": torch.zeros(3, 4)})
    torch.testing.assert_close(v, data - x_0, atol=1e-12, rtol=0)


def test_packing_is_the_pipelines_and_has_an_inverse():
    from diffusers import FluxPipeline

    flux, x = Flux(SimpleNamespace()), torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(flux.pack(x), FluxPipeline._pack_latents(x, 2, 4, 6, 8), rtol=0, atol=0)
    torch.testing.assert_close(flux.unpack(flux.pack(x), 3, 4), x, rtol=0, atol=0)


# -- grids ----------------------------------------------------------------------------------------


def sd3(tiny_pipeline, **settings: Any) -> PretrainedField:
    return pretrained(str(tiny_pipeline("sd3")), **{"resolution": SIDE, "max_sequence_length": LENGTH, **settings})


def test_the_twice_shifted_grid_of_sd3_and_its_last_two_steps(tiny_pipeline):
    field = sd3(tiny_pipeline, lora=2)
    sigma = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.278, 0.0089, 0]
    torch.testing.assert_close(1 - field.times(10), torch.tensor(sigma).double(), atol=1e-4, rtol=0)
    policy = FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=10)
    policy.check_steps(AllButLast(skip_last=2))
    with pytest.raises(ValueError, match=r"steps \[8\] of 10 end too near the data.*steps\.skip_last=2"):
        policy.check_steps(AllButLast(skip_last=1))
    guided = FlowPolicy(CFG(field, 4.5), FlowSDE(), grid=FromScheduler(field), num_steps=10)
    with pytest.raises(ValueError, match=r"steps \[8, 9\] of 10"):
        guided.check_steps(AllButLast(skip_last=0))


def test_the_dynamic_shift_follows_the_resolution(tiny_pipeline):
    field = pretrained(str(tiny_pipeline("flux")), resolution=32, lora=2)
    small = field.times(8)
    field.resize(64)
    assert field.event_shape == (4, 16, 16)
    assert bool((field.times(8)[1:-1] < small[1:-1]).all()), "more tokens, more noise"


@pytest.mark.parametrize(
    ("resolution", "why"),
    [
        (30, "resolution 30 must be a positive multiple of 8"),
        (136, "resolution 136: the network has positions for 16 patches of 8 pixels a side: 128 at most"),
        ((32, 32), r"resolution \(32, 32\): pictures are square, give one whole number of pixels a side"),
        (32.0, "resolution 32.0: pictures are square"),
    ],
)
def test_resolutions_that_the_network_cannot_make_are_refused(resolution, why, tiny_pipeline):
    with pytest.raises(ValueError, match=why):
        sd3(tiny_pipeline, resolution=resolution)
    field = sd3(tiny_pipeline, resolution=128)
    with pytest.raises(ValueError, match=why):
        field.resize(resolution)
    assert field.event_shape == (4, 32, 32)


@pytest.mark.parametrize(("terminal", "num"), [(0.02, 2), (0.021, 0), (0.0199, 2)])
def test_a_grid_that_ends_at_sigma_02_is_met_at_any_number_of_steps(terminal, num, tiny_pipeline):
    """Though float32 puts .02 on either side of itself."""
    field = pretrained(str(tiny_pipeline("flux", shift_terminal=terminal)), resolution=SIDE, lora=2)
    grids = [field.times(k) for k in range(2, 60)]
    if terminal == 0.02:
        assert {float(1 - t[-2]) < terminal for t in grids} == {True, False}
    assert {field.unscored(t) for t in grids} == {num}


def test_one_step_to_a_terminal_sigma_is_refused_with_the_grid_that_is_right(tiny_pipeline):
    field = pretrained(str(tiny_pipeline("flux", shift_terminal=0.02)), resolution=SIDE, lora=2)
    with pytest.raises(
        ValueError, match=r"FlowMatchEulerDiscreteScheduler sets sigmas \[nan, 0.0\] for 1 steps: .*=uniform"
    ):
        FromScheduler(field)(1)
    assert bool(FromScheduler(field)(2).isfinite().all())


# -- schedulers -----------------------------------------------------------------------------------


def test_every_setting_of_the_scheduler_is_honoured_or_refused():
    """A later version's new setting fails here, and in `check`, until someone has looked at what it does."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    known = scheduler.GRID | set(scheduler.FIXED)
    assert known == set(inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters) - {"self"}
    plain = FlowMatchEulerDiscreteScheduler()
    scheduler.check(plain, "x")
    assert {name: plain.config[name] for name in scheduler.FIXED} == {n: v for n, (v, _) in scheduler.FIXED.items()}


MOVED = {
    "shift": {"shift": 2.0},
    "terminal": {"shift_terminal": 0.1},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "base": {"use_dynamic_shifting": True, "base_shift": 0.7, "base_image_seq_len": 16},
    "max": {"use_dynamic_shifting": True, "max_shift": 1.9, "max_image_seq_len": 64},
}


@pytest.fixture(scope="module")
def stock_sd3(tiny_pipeline) -> Stock:
    from diffusers import DiffusionPipeline

    folder = tiny_pipeline("sd3")
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return Stock(pipe, pretrained(str(folder), resolution=SIDE, max_sequence_length=LENGTH).requires_grad_(False))


@pytest.mark.parametrize("settings", MOVED.values(), ids=MOVED)
def test_what_moves_the_grid_is_honoured(settings, stock_sd3):
    from diffusers import FlowMatchEulerDiscreteScheduler

    before = stock_sd3.field.times(STEPS)
    other = FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **settings})
    scheduler.check(other, "x")
    ours, kept = stock_sd3.field.adapter.pipe, stock_sd3.field.adapter.pipe.scheduler
    stock_sd3.pipe.scheduler = ours.scheduler = other
    try:
        assert stock_sd3.distance(1.0) < 1e-5
        assert not torch.equal(stock_sd3.field.times(STEPS), before)
    finally:
        stock_sd3.pipe.scheduler = ours.scheduler = kept


@pytest.mark.parametrize(
    "setting", [{"stochastic_sampling": True}, {"invert_sigmas": True}, {"num_train_timesteps": 500}]
)
def test_what_changes_more_than_the_grid_is_refused(setting, tiny_pipeline):
    """By whoever opens the pipeline, and by whoever only plans a run on it."""
    folder, (name,) = str(tiny_pipeline("sd3", **setting)), setting
    for made in (pretrained, lambda c: shape_of(c, {"resolution": SIDE})):
        with pytest.raises(ValueError, match=f"scheduler_config.json: {name} is .*, and only .* is possible"):
            made(folder)


def test_other_schedulers_and_settings_are_refused():
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    with pytest.raises(ValueError, match="the scheduler is a FlowMatchHeunDiscreteScheduler, whose steps are not ours"):
        scheduler.check(FlowMatchHeunDiscreteScheduler(), "x")
    config = dict(FlowMatchEulerDiscreteScheduler().config) | {"of_a_later_version": 1}
    with pytest.raises(ValueError, match="of_a_later_version is no setting .* that is known here"):
        scheduler.check(FlowMatchEulerDiscreteScheduler.from_config(config), "x")


# -- text -----------------------------------------------------------------------------------------


def test_each_distinct_prompt_is_encoded_once(tiny_pipeline):
    field = sd3(tiny_pipeline, lora=2)
    policy = FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=4)
    for _ in range(2):
        cond = policy.encode(field.tokenize(PROMPTS * 3))
        with torch.no_grad():
            policy.sample(cond, copies=2)
    assert field.table.encoded == len(PROMPTS)
    assert {name: value.shape for name, value in cond.data.items()} == {"prompt": (6,), "pooled": (6, 32)}


def test_a_prompts_encoding_does_not_depend_on_its_company(tiny_pipeline):
    """Short beside long, alone or with eleven others: equal bit for bit, so a resumed run is too."""
    alone, together = sd3(tiny_pipeline), sd3(tiny_pipeline)
    many = [*PROMPTS, *(f"number {i}" for i in range(10))]
    expected = together.table(together.tokenize(many))
    for i, text in enumerate(many[:3]):
        for name, value in alone.table(alone.tokenize([text])).items():
            assert torch.equal(value[0], expected[name][i]), (name, text)


def test_long_prompts_are_cut_as_in_the_pipeline(tiny_pipeline):
    field = sd3(tiny_pipeline)
    long = "many " * 60
    found = field.table(field.tokenize([long, long + "more"]))
    torch.testing.assert_close(found["tokens"][0], found["tokens"][1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_padding_is_part_of_the_text(kind, tiny_pipeline):
    """The same short prompt, padded further, is another velocity: so padding is never trimmed to the batch."""
    folder, found = str(tiny_pipeline(kind)), []
    for length in (LENGTH, 2 * LENGTH):
        field = pretrained(folder, resolution=SIDE, max_sequence_length=length)
        text = field.table(numbers := field.tokenize(["a cat", PROMPTS[0]]))["tokens"]
        assert text.shape[1] == length + (77 if kind == "sd3" else 0)
        x, t = torch.ones(2, *field.event_shape), torch.tensor([0.3, 0.3])
        with torch.no_grad():
            found.append(field(x, t, 0 * t, field.encode(numbers)))
    assert ((found[0] - found[1]).flatten(1).norm(dim=1) > 1e-2 * found[0].flatten(1).norm(dim=1)).all()


def test_the_negative_prompt_is_what_guidance_subtracts(tiny_pipeline):
    plain, negative = sd3(tiny_pipeline), sd3(tiny_pipeline, negative_prompt="ugly")
    x, t = torch.randn(1, *plain.event_shape), torch.tensor([0.3])
    ugly = plain(x, t, 0 * t, plain.encode(plain.tokenize(["ugly"])))
    cond = negative.encode(negative.tokenize(["a cat"]))
    torch.testing.assert_close(negative(x, t, 0 * t, negative.null(cond)), ugly, rtol=0, atol=0)


def test_released_encoders_leave_their_encodings(tiny_pipeline):
    kept, released = sd3(tiny_pipeline), sd3(tiny_pipeline, release_encoders=True)
    numbers = released.tokenize(PROMPTS)
    released.settle()
    assert all(getattr(released.adapter.pipe, name) is None for name in released.adapter.encoders)
    expected = kept.encode(kept.tokenize(PROMPTS))
    torch.testing.assert_close(released.encode(numbers)["pooled"], expected["pooled"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="encoders were released"):
        released.tokenize(["never seen"])


def test_a_full_table_forgets_the_least_used_and_encodes_again(tiny_pipeline):
    field = sd3(tiny_pipeline, cache=2)
    first = field.table(field.tokenize(["one", "two"]))["tokens"].clone()
    field.table(field.tokenize(["three", "four"]))
    again = field.table(field.tokenize(["one", "two"]))["tokens"]
    assert field.table.encoded == 6
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_a_scale_of_ones_own_enters_flux(tiny_pipeline):
    """As the stock pipeline's `guidance_scale`; the setting replaces 3.5."""
    folder = tiny_pipeline("flux")
    given = {"resolution": SIDE, "max_sequence_length": LENGTH}
    field, other = (pretrained(str(folder), embedded_guidance=g, **given) for g in (None, 1.5))
    assert (field.adapter.embedded_guidance, other.adapter.embedded_guidance) == (3.5, 1.5)
    x, t = torch.randn(1, *field.event_shape), torch.tensor([0.3])
    with torch.no_grad():
        mine = [f(x, t, 0 * t, f.encode(f.tokenize(["a cat"]))) for f in (field, other)]
        field.adapter.embedded_guidance = 1.5
        again = field(x, t, 0 * t, field.encode(field.tokenize(["a cat"])))
    assert not torch.allclose(*mine, rtol=1e-3)
    assert torch.equal(again, mine[1])


def test_schnell_takes_no_scale_and_few_steps(tiny_pipeline):
    """The published settings: 4 steps of an even grid, texts of 256 tokens, one pass; a scale would change nothing."""
    folder = tiny_pipeline("flux_schnell")
    with pytest.raises(ValueError, match="flux_schnell.* has no guidance input: use policy.guidance"):
        pretrained(str(folder), resolution=SIDE, embedded_guidance=9.0)
    policy = rf.load(folder, resolution=SIDE)
    assert policy.field.max_sequence_length == 256
    torch.testing.assert_close(policy.plan().t, torch.tensor([0, 0.25, 0.5, 0.75, 1.0]).to(policy.plan().t))


def decoder_calls(field: PretrainedField) -> int:
    """For two pictures."""
    calls: list[int] = []
    field.adapter.pipe.vae.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    assert field.decode(torch.randn(2, *field.event_shape)).shape == (2, 3, field.resolution, field.resolution)
    return len(calls)


def test_tiles_are_the_vaes_own(tiny_pipeline):
    """Of 8 x 8 latents every 6: three by three for 16 x 16, and one for what fits in it."""
    assert decoder_calls(sd3(tiny_pipeline, resolution=64)) == 2
    assert decoder_calls(sd3(tiny_pipeline, resolution=64, vae_tiling=True)) == 2 * 9
    assert decoder_calls(sd3(tiny_pipeline, resolution=32, vae_tiling=True)) == 2


# -- loading --------------------------------------------------------------------------------------


def test_load_samples_as_the_pipeline_does(tiny_pipeline):
    policy = rf.load(tiny_pipeline("sd3"), resolution=SIDE, num_steps=3)
    assert policy.field.scale == 7.0
    assert torch.equal(policy.plan().t, policy.field.times(3))
    images = rf.sample(policy, ["a cat"], seed=1)
    assert images.shape == (1, 3, SIDE, SIDE)
    assert not any(p.requires_grad for p in policy.parameters())


def test_what_cannot_be_loaded_is_said(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="has no model_index.json"):
        pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="there is no folder 'sd3_scenes'.*`rlflow pretrain sd3_scenes` makes it"):
        pretrained("sd3_scenes")
    with pytest.raises(ValueError, match="'nobody/nothing' is not on this machine .*, for HF_HUB_OFFLINE is set"):
        rf.load("nobody/nothing")
    with pytest.raises(ValueError, match="shapes is no diffusers pipeline"):
        rf.load("shapes", lora=4)
    (tmp_path / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    with pytest.raises(ValueError, match="is a OtherPipeline; there are adapters for"):
        rf.load(tmp_path)
    with pytest.raises(ValueError, match="has no guidance input: use policy.guidance"):
        sd3(tiny_pipeline, embedded_guidance=3.5)


def test_without_a_network_it_is_said_at_once(monkeypatch, tmp_path):
    """Not after the library's six requests in half a minute; the setting that spares even one is named."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    client, asked = type(get_session()), []
    send = client.send
    monkeypatch.setattr(
        client, "send", lambda self, request, **k: asked.append(request.url) or send(self, request, **k)
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "unreachable", hub.unreachable.__wrapped__)  # asked anew
    with pytest.raises(ValueError, match=r"there is no network to http://127.0.0.1:9 .*HF_HUB_OFFLINE=1"):
        rf.load("nobody/nothing")
    assert not [url for url in asked if "nobody" in str(url)], "what does not answer is not asked for files"


def test_loading_is_quiet_and_leaves_the_libraries_as_they_were(tiny_pipeline, capfd):
    import diffusers.utils.logging as diffusers_logging

    before = diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()
    capfd.readouterr()
    sd3(tiny_pipeline, lora=2)
    assert capfd.readouterr() == ("", "")
    assert (diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()) == before


def test_a_folder_of_one_variant_names_the_setting_that_opens_it(tmp_path, tiny_pipeline):
    from diffusers import DiffusionPipeline

    DiffusionPipeline.from_pretrained(tiny_pipeline("sd3")).save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match=r"text_encoder holds \*\.fp16\.\* weights only: set variant=fp16"):
        rf.load(tmp_path, resolution=SIDE)
    policy = rf.load(tmp_path, resolution=SIDE, variant="fp16", num_steps=2)
    assert policy.field.unguided.args["variant"] == "fp16"
    with pytest.raises(ValueError, match="holds no pipeline that can be loaded .*bf16"):
        rf.load(tmp_path, resolution=SIDE, variant="bf16")


@pytest.mark.parametrize("part", ["vae", "text_encoder_2", "transformer"])
def test_weights_that_are_inf_or_nan_are_named(part, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_tiny("sd3", tmp_path / "tiny")
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    name = next(n for n, value in weights.items() if value.ndim > 1)
    weights[name][0] = 1e9 * weights[name][0].half() * float("inf")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{part}\..* has \d+ entries that are inf or nan"):
        pretrained(str(folder), resolution=SIDE)


def test_nothing_is_in_training_mode(tiny_pipeline):
    """Sampling and scoring have to be one network: its LoRA, encoders and VAE too."""
    pipe = sd3(tiny_pipeline, lora=2).adapter.pipe
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(networks) == 5
    assert not any(module.training for network in networks for module in network.modules())
