"""The small pipelines that rlflow trains itself: plain diffusers reads them, and every word is one token."""

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
from rlflow.models.pretrained import lora, tiny_language
from rlflow.models.pretrained.pipeline import family, pretrained
from rlflow.models.pretrained.tiny import clip_tokenizer, t5_tokenizer
from rlflow.pretrain import latent_scenes, scene_pipelines
from rlflow.pretrain.worlds import LATENT


def test_every_word_is_one_token_and_no_caption_is_cut(tmp_path: Path) -> None:
    """Pairs of a shorter word must not break up a longer one ("re" of red in green)."""
    tokenizer = clip_tokenizer(tmp_path, scenes.VOCAB, scene_pipelines.LENGTH)
    assert {word: tokenizer.tokenize(word) for word in scenes.VOCAB} == {w: [w + "</w>"] for w in scenes.VOCAB}
    pieces = t5_tokenizer(scenes.VOCAB)
    assert {word: pieces.tokenize(word) for word in scenes.VOCAB} == {w: ["▁" + w] for w in scenes.VOCAB}
    captions = scenes.train_captions() + scenes.heldout_captions()
    assert max(len(tokenizer(caption).input_ids) for caption in captions) == scene_pipelines.LENGTH
    spoken = tiny_language.tokenizer(scenes.VOCAB, scenes.VOCAB, scene_pipelines.CHAT)
    for caption in captions[::20]:
        chat = spoken.apply_chat_template([{"role": "user", "content": caption}], tokenize=False)
        assert [spoken.decode([i]).strip() for i in spoken(chat).input_ids[1:-1]] == caption.split()


@pytest.mark.parametrize("name", scene_pipelines.FORMATS)
def test_what_the_network_learns_to_make_is_what_the_pipeline_decodes(name: str) -> None:
    """Latents at the network's scale are of about unit size, and `Adapter.for_vae` gives back what was encoded."""
    made_of = scene_pipelines.FORMATS[name]
    vae = made_of.vae()
    channels = vae.config.latent_channels
    z = torch.randn(64, channels, 8, 8) * torch.linspace(0.5, 1.0, channels).view(-1, 1, 1) + 0.3
    made_of.settle(vae, z)
    x, pipe = made_of.scaled(vae, z), made_of.pipeline(vae)
    torch.testing.assert_close(x.square().mean().sqrt(), torch.tensor(1.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(family(type(pipe).__name__)(pipe).for_vae(x), z)
    if name == "klein":
        torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(4 * channels), atol=1e-3, rtol=0)
        torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(4 * channels), atol=1e-5, rtol=0)


def made(name: str, out: Path) -> Path:
    """A pipeline after two steps."""
    args = argparse.Namespace(seed=0, steps=2, vae_steps=2, rows=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_scenes, "judge_scenes", lambda field: {"heldout_strict": 0.0})
        patch.setattr(latent_scenes, "reconstructed", lambda vae: 0.0)
        made_by = LATENT[name].make(out, args)
    assert made_by["command"] == f"rlflow pretrain {name} --vae-steps 2 --rows 8 --steps 2 --seed 0"
    return out


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each format."""
    return made(f"{request.param}_scenes", tmp_path_factory.mktemp("made") / request.param)


@pytest.mark.parametrize("folder", ["sd3", "klein", pytest.param("sd15", marks=pytest.mark.slow)], indirect=True)
def test_plain_diffusers_draws_what_rlflow_draws(folder: Path) -> None:
    """From the same noise, pictures and all; the pipeline is of the format's own class."""
    from diffusers import DiffusionPipeline

    policy = rf.load(str(folder), resolution=scene_pipelines.SIDE, guidance=1.0, num_steps=4)
    captions = ["two red circles", "a blue square left of a red circle"]
    noise = torch.randn(2, *policy.event_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = policy.field.decode(policy.sample(policy.encode(policy.field.tokenize(captions)), x_0=noise).final)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": scene_pipelines.SIDE, "width": scene_pipelines.SIDE}
    told = {"prompt": captions, "latents": noise, "guidance_scale": 1.0, "num_inference_steps": 4}
    stock = pipe(**told, **size, output_type="pt").images
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folder", ["sd3", "klein"], indirect=True)
def test_the_pictures_judged_in_plain_diffusers_are_those_of_the_base_and_of_the_lora(
    folder: Path,
    tmp_path: Path,
    load_script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """scripts/plain_pipeline.py judges first the base's and then the LoRA's, each as rlflow draws it from that noise."""
    field = pretrained(str(folder), resolution=scene_pipelines.SIDE, max_sequence_length=scene_pipelines.LENGTH, lora=4)
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
