"""FLUX.2 klein, Z-Image, Qwen-Image: our chain gives the latents and pictures of the stock pipeline (diffusers 0.42.1).

To 1e-5 of their length in float32, with guidance and without; and the comparison sees what an adapter can get wrong.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlflow.flow.grid import FromScheduler
from rlflow.flow.guidance import CFG, CFGNorm
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.models.pretrained.families.packing import pack, unpack
from rlflow.models.pretrained.pipeline import PretrainedField, pretrained
from tests.models.pretrained.test_pipeline import ByOne

SIDE, LENGTH, STEPS, EXACT = 32, 24, 6, 1e-5
PROMPTS = ["a red cat", "two dogs in front of a very long house with many windows, at night, and a third dog"]


def klein(x_0: Tensor, w: float) -> dict[str, Any]:
    return {"latents": x_0, "guidance_scale": w}


def flux2_dev(x_0: Tensor, w: float) -> dict[str, Any]:
    return {"latents": x_0, "guidance_scale": 4.0}


def z_image(x_0: Tensor, w: float) -> dict[str, Any]:
    """Its scale counts from 0."""
    return {"latents": x_0, "guidance_scale": w - 1}


def qwen_image(x_0: Tensor, w: float) -> dict[str, Any]:
    """It guides only where there is a negative prompt."""
    return {"latents": pack(x_0), "true_cfg_scale": w, "negative_prompt": [""] * len(x_0) if w > 1 else None}


CALLS: dict[str, Callable[[Tensor, float], dict[str, Any]]] = {
    f.__name__: f for f in (klein, flux2_dev, z_image, qwen_image)
}
UNPACKED: dict[str, Callable[[Tensor], Tensor]] = {
    "klein": lambda tokens: tokens.mT.unflatten(2, (SIDE // 8, SIDE // 8)),
    "flux2_dev": lambda tokens: tokens.mT.unflatten(2, (SIDE // 8, SIDE // 8)),
    "z_image": lambda latents: latents,
    "qwen_image": lambda tokens: unpack(tokens, SIDE // 8, SIDE // 8),
}


@dataclass
class Stock:
    """A stock pipeline and our field of the same folder."""

    kind: str
    pipe: Any
    field: PretrainedField
    num_steps: int = STEPS

    def theirs(self, x_0: Tensor, w: float, **more: Any) -> tuple[Tensor, Tensor]:
        """(latents, pictures) of the stock pipeline from the noise x_0; w in our convention, 1 for none."""
        seen: list[Tensor] = []

        def keep(pipe: Any, step: int, t: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append(state["latents"])
            return state

        settings = {"num_inference_steps": self.num_steps, "height": SIDE, "width": SIDE}
        settings |= {"max_sequence_length": self.field.max_sequence_length}
        settings |= {"output_type": "pt", "callback_on_step_end": keep}
        found = self.pipe(prompt=list(PROMPTS), **CALLS[self.kind](x_0, w), **settings, **more).images
        return UNPACKED[self.kind](seen[-1]), found

    def ours(self, x_0: Tensor, w: float, guided: Any = None, grid: Any = None) -> Tensor:
        """Latents of our ODE."""
        field = (guided or self.field.adapter.guided)(self.field, w) if w > 1 else self.field
        policy = FlowPolicy(field, FlowSDE(), grid=grid or FromScheduler(self.field), num_steps=self.num_steps)
        with torch.no_grad():
            return policy.sample(policy.encode(self.field.tokenize(PROMPTS)), x_0=x_0).final

    def distance(self, w: float, ours: float | None = None, more: dict[str, Any] | None = None, **how: Any) -> float:
        """|ours - theirs| / |theirs|."""
        x_0 = torch.randn(2, *self.field.event_shape)
        theirs, _ = self.theirs(x_0, w, **(more or {}))
        return float((self.ours(x_0, ours or w, **how) - theirs).norm() / theirs.norm())


def stock_of(kind: str, folder: Path, length: int = LENGTH) -> Stock:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    field = pretrained(str(folder), resolution=SIDE, max_sequence_length=length).requires_grad_(False)
    return Stock(kind, pipe, field)


@pytest.fixture(scope="module", params=["klein", "z_image", "qwen_image"])
def stock(request, tiny_pipeline) -> Stock:
    return stock_of(request.param, tiny_pipeline(request.param))


def test_the_versions_are_those_that_the_docs_name():
    """Qwen-Image's pipeline changed what it passes between versions (0.36 gave lengths that 0.42 does not)."""
    root = Path(__file__).parents[4]
    (tested,) = re.findall(r"^diffusers==(\S+)", (root / "constraints.txt").read_text(), re.M)
    said = (root / "docs/results/pretrained.md").read_text()
    assert f"diffusers {tested}" in said, "measure the table of parity again, and name the new version there"


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_our_ode_gives_the_latents_of_the_stock_pipeline(stock, w):
    assert stock.distance(w) < EXACT


def test_our_decoder_gives_the_pictures_of_the_stock_pipeline(stock):
    """Scale and shift, mean and spread of each channel, statistics of a batch norm."""
    x_0 = torch.randn(2, *stock.field.event_shape)
    latents, theirs = stock.theirs(x_0, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(stock.field.decode(latents), theirs, rtol=0, atol=EXACT)
        wrong = stock.field.adapter.picture(latents) if stock.kind != "klein" else None
    assert theirs.std() > 1e-2
    assert wrong is None or (wrong / 2 + 0.5 - theirs).abs().max() > 1e-2, "the VAE's scale changes the picture"


def test_parity_sees_a_grid_shifted_by_one_entry(stock):
    assert stock.distance(1.0, grid=ByOne(stock.field)) > 1e-3


def test_parity_sees_guidance_that_is_ten_percent_off(stock):
    assert stock.distance(3.0, ours=3.3) > 1e-3


WRONG: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "a sign that is flipped": lambda predict: lambda x, sigma, text: -predict(x, sigma, text),
    "a timestep that is truncated": lambda predict: lambda x, s, text: predict(x, (1000 * s).long() / 1000, text),
    "a time that runs the other way": lambda predict: lambda x, sigma, text: predict(x, 1 - sigma, text),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_parity_sees(wrong, stock, monkeypatch):
    monkeypatch.setattr(stock.field.adapter, "predict", wrong(stock.field.adapter.predict))
    assert stock.distance(1.0) > 2 * EXACT


# -- kinds of guidance ----------------------------------------------------------------------------


def test_guidance_is_the_pipelines_own_kind(stock, monkeypatch):
    """Qwen-Image's keeps the length of each packed token: not of none, and not of the whole sample."""
    others = {CFG, CFGNorm} - {stock.field.adapter.guided}
    assert stock.distance(3.0) < EXACT
    for other in others:
        assert stock.distance(3.0, guided=other) > 1e-3
    if stock.kind == "qwen_image":
        monkeypatch.setattr(stock.field.adapter, "lengths", lambda v: None)
        assert stock.distance(3.0) > 1e-3


def test_z_images_cap_on_the_length_of_a_sample(tiny_pipeline):
    stock = stock_of("z_image", tiny_pipeline("z_image"))
    for cap in (0.9, 1.2):
        more = {"cfg_normalization": cap}
        assert stock.distance(3.0, more=more, guided=lambda field, w: CFGNorm(field, w, cap=cap)) < EXACT  # noqa: B023
        assert stock.distance(3.0, more=more) > 1e-3


def test_dev_is_klein_with_a_guidance_input(tiny_pipeline):
    """Its pipeline's scale of 4; the text's system message takes most of a short limit, so this one is longer."""
    stock = stock_of("flux2_dev", tiny_pipeline("flux2_dev"), 400)
    assert stock.distance(1.0) < EXACT
    (short, long) = stock.field.adapter.text_lengths(PROMPTS, 400)
    assert long - short > 50
    assert long < 400
    stock.field.adapter.embedded_guidance = 4.4
    assert stock.distance(1.0) > 1e-3
