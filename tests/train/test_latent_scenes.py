"""The small Stable Diffusion 3 that rlflow trains itself: plain diffusers reads it, and every word is one token."""

import argparse
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

import rlflow as rf
from rlflow.envs import scenes
from rlflow.models.tiny import clip_tokenizer, t5_tokenizer
from rlflow.train import latent_scenes, worlds


def test_every_word_is_one_token_and_no_caption_is_cut(tmp_path: Path) -> None:
    """Pairs of a shorter word must not break up a longer one ("re" of red in green)."""
    tokenizer = clip_tokenizer(tmp_path, scenes.VOCAB, latent_scenes.LENGTH)
    assert {word: tokenizer.tokenize(word) for word in scenes.VOCAB} == {w: [w + "</w>"] for w in scenes.VOCAB}
    pieces = t5_tokenizer(scenes.VOCAB)
    assert {word: pieces.tokenize(word) for word in scenes.VOCAB} == {w: ["▁" + w] for w in scenes.VOCAB}
    longest = max(len(tokenizer(caption).input_ids) for caption in scenes.train_captions() + scenes.heldout_captions())
    assert longest == latent_scenes.LENGTH


def test_plain_diffusers_draws_what_rlflow_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is a StableDiffusion3Pipeline; from the same noise both end at the same latents."""
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(worlds, "judge_scenes", lambda field: {"heldout_strict": 0.0})
    monkeypatch.setattr(latent_scenes, "reconstructed", lambda vae: 0.0)
    args = argparse.Namespace(seed=0, steps=2, vae_steps=2, rows=64)
    made_by = latent_scenes.LatentScenes().make(tmp_path / "sd3", args)
    assert made_by["command"] == "rlflow pretrain sd3_scenes --vae-steps 2 --rows 64 --steps 2 --seed 0"

    policy = rf.load(str(tmp_path / "sd3"), guidance=1.0, num_steps=4)
    captions = ["two red circles", "a blue square left of a red circle"]
    noise = torch.randn(2, *policy.event_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cond, x, grid = policy.field.encode(policy.field.tokenize(captions)), noise, policy.field.times(4)
        for t, t_next in zip(grid[:-1].float(), grid[1:].float(), strict=True):
            x = x + (t_next - t) * policy.field(x, t.expand(2), torch.zeros(2), cond)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "sd3")
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
