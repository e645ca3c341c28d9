"""The small Stable Diffusion 3 that rlflow trains itself: plain diffusers reads it, and every word is one token."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("diffusers")

import rlflow as rf
from rlflow.envs.captions import scenes
from rlflow.flow.grid import FromScheduler
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.models.pretrained import lora
from rlflow.models.pretrained.pipeline import pretrained
from rlflow.models.pretrained.tiny import clip_tokenizer, t5_tokenizer
from rlflow.pretrain import latent_scenes
from rlflow.pretrain.worlds import LATENT


def test_every_word_is_one_token_and_no_caption_is_cut(tmp_path: Path) -> None:
    """Pairs of a shorter word must not break up a longer one ("re" of red in green)."""
    tokenizer = clip_tokenizer(tmp_path, scenes.VOCAB, latent_scenes.LENGTH)
    assert {word: tokenizer.tokenize(word) for word in scenes.VOCAB} == {w: [w + "</w>"] for w in scenes.VOCAB}
    pieces = t5_tokenizer(scenes.VOCAB)
    assert {word: pieces.tokenize(word) for word in scenes.VOCAB} == {w: ["▁" + w] for w in scenes.VOCAB}
    longest = max(len(tokenizer(caption).input_ids) for caption in scenes.train_captions() + scenes.heldout_captions())
    assert longest == latent_scenes.LENGTH


def made(name: str, out: Path) -> Path:
    """A pipeline after two steps."""
    args = argparse.Namespace(seed=0, steps=2, vae_steps=2, rows=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_scenes, "judge_scenes", lambda field: {"heldout_strict": 0.0})
        patch.setattr(latent_scenes, "reconstructed", lambda vae: 0.0)
        made_by = LATENT[name].make(out, args)
    assert made_by["command"] == f"rlflow pretrain {name} --vae-steps 2 --rows 64 --steps 2 --seed 0"
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion 3."""
    return made("sd3_scenes", tmp_path_factory.mktemp("made") / "sd3")


@pytest.mark.slow
def test_the_old_one_draws_in_plain_diffusers_what_it_draws_here(tmp_path: Path) -> None:
    """A StableDiffusionPipeline, pictures and all: its VAE has no shift."""
    from diffusers import DiffusionPipeline

    folder = made("sd15_scenes", tmp_path / "sd15")
    policy = rf.load(str(folder), guidance=1.0, num_steps=4)
    captions = ["two red circles", "a blue square left of a red circle"]
    noise = torch.randn(2, *policy.event_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = policy.field.decode(policy.sample(policy.encode(policy.field.tokenize(captions)), x_0=noise).final)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    settings = {
        "guidance_scale": 1.0,
        "num_inference_steps": 4,
        "height": latent_scenes.SIDE,
        "width": latent_scenes.SIDE,
    }
    stock = pipe(captions, latents=noise, output_type="pt", **settings).images
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_plain_diffusers_draws_what_rlflow_draws(folder: Path) -> None:
    """The folder is a StableDiffusion3Pipeline; from the same noise both end at the same latents."""
    from diffusers import DiffusionPipeline

    policy = rf.load(str(folder), guidance=1.0, num_steps=4)
    captions = ["two red circles", "a blue square left of a red circle"]
    noise = torch.randn(2, *policy.event_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cond, x, grid = policy.field.encode(policy.field.tokenize(captions)), noise, policy.field.times(4)
        for t, t_next in zip(grid[:-1].float(), grid[1:].float(), strict=True):
            x = x + (t_next - t) * policy.field(x, t.expand(2), torch.zeros(2), cond)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        captions,
        latents=noise,
        guidance_scale=1.0,
        num_inference_steps=4,
        output_type="latent",
        height=latent_scenes.SIDE,
        width=latent_scenes.SIDE,
    ).images
    torch.testing.assert_close(x, stock, rtol=1e-4, atol=1e-4)


def test_the_pictures_judged_in_plain_diffusers_are_those_of_the_base_and_of_the_lora(
    folder: Path,
    tmp_path: Path,
    load_script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """scripts/plain_pipeline.py judges first the base's and then the LoRA's, each as rlflow draws it from that noise."""
    field = pretrained(str(folder), resolution=latent_scenes.SIDE, max_sequence_length=latent_scenes.LENGTH, lora=4)
    policy = FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=3)
    captions = scenes.heldout_captions()[:2]

    def drawn() -> torch.Tensor:
        x_0 = torch.randn(2, *field.event_shape, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            return field.decode(policy.sample(policy.encode(field.tokenize(captions)), x_0=x_0).final)

    base, generator = drawn(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora.parameters(field).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    tuned = drawn()
    rf.save(policy, tmp_path)

    judged = []

    def verifier(images: torch.Tensor, asked: list[str]) -> torch.Tensor:
        assert asked == captions
        judged.append(images)
        return torch.full((2,), len(judged) / 4)

    script = load_script("plain_pipeline")
    monkeypatch.setattr(script, "shapes_strict", verifier)
    options = ["--num", "2", "--num-steps", "3", "--seed", "5"]
    monkeypatch.setattr("sys.argv", ["plain_pipeline.py", str(folder), str(tmp_path), *options])
    capsys.readouterr()
    script.main()
    said = json.loads(capsys.readouterr().out)
    assert said == {"pictures": 2, "num_steps": 3, "strict_without": 0.25, "strict_with": 0.5}
    for images, mine in zip(judged, (base, tuned), strict=True):
        torch.testing.assert_close(images, mine, rtol=1e-4, atol=1e-4)
    assert (tuned - base).abs().max() > 1e-2, "the LoRA does something"
