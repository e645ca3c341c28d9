"""What lies on the card beside the policy: text encoders and the networks of rewards, in the plan's memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from rlflow.cli import main
from rlflow.config import recipes
from rlflow.config.schema import Config
from rlflow.cost.estimate import Planner, _staying, not_counted
from rlflow.cost.reward_networks import PARAMETERS, reward_networks
from rlflow.models.pretrained.known import KNOWN, UMT5_XXL
from rlflow.models.pretrained.pipeline import pretrained

L, H = PARAMETERS["openai/clip-vit-large-patch14"], PARAMETERS["yuvalkirstain/PickScore_v1"]
SD3 = KNOWN["stabilityai/stable-diffusion-3.5-medium"].encoders
FLUX = KNOWN["black-forest-labs/FLUX.1-dev"].encoders
DETECTOR = PARAMETERS["facebook/mask2former-swin-small-coco-instance"]


def rewards(weights: str, metrics: str = "{}", settings: str = "{}") -> Config:
    changes = [f"reward.weights={{{weights}}}", f"reward.settings={settings}", f"eval.metrics={metrics}"]
    return recipes.load("t2i_flow_grpo_fast", changes)


@pytest.mark.parametrize(
    ("weights", "metrics", "numbers"),
    [
        ("shapes_soft: 1", "{jpeg: jpeg_compressibility}", 0),
        ("pickscore: 1", "{pickscore: pickscore}", H),
        ("pickscore: 1, hps: 1", "{}", 2 * H),
        ("clip_score: 1, pickscore: 0", "{again: image_similarity}", L + H),
        ("geneval: 1", "{}", L + DETECTOR),
        ("geneval: 1, clip_score: 1", "{geneval: geneval}", L + 2 * DETECTOR),
    ],
)
def test_a_network_counts_once_and_a_detector_as_often_as_it_is_made(weights: str, metrics: str, numbers: int) -> None:
    found = reward_networks(rewards(weights, metrics))
    assert (found.bytes, found.not_counted) == (4 * numbers, ())


def test_the_reward_that_chooses_among_samples_counts_too() -> None:
    select = "policy.select={name: best_of, num: 4, scorer: pickscore}"
    changes = ["reward.weights={shapes_soft: 1}", "eval.metrics={}", select]
    assert reward_networks(recipes.load("t2i_flow_grpo_fast", changes)).bytes == 4 * H


@pytest.mark.parametrize(
    ("settings", "numbers", "said"),
    [
        ("{pickscore: {device: cpu}}", 0, ""),
        ("{pickscore: {offload: true}}", 0, "pickscore (yuvalkirstain/PickScore_v1 while it scores)"),
        ("{pickscore: {precision: bfloat16}}", 2 * H, ""),
        ("{pickscore: {model: someone/else}}", 0, "pickscore (someone/else: size not known)"),
        ("{pickscore: {name: group_rank, of: clip_score}}", 4 * L, ""),
        ("{pickscore: {name: group_rank, of: hps, settings: {offload: true, device: cpu}}}", 0, ""),
    ],
)
def test_settings_say_what_lies_on_the_card(settings: str, numbers: int, said: str) -> None:
    found = reward_networks(rewards("pickscore: 1", settings=settings))
    assert (found.bytes, ", ".join(found.not_counted)) == (numbers, said)


def test_code_of_your_own_is_named() -> None:
    config = rewards("brightness: 1")
    config.reward.weights["rlflow.rewards.colour:redness"] = 1.0
    assert reward_networks(config).not_counted == ("rlflow.rewards.colour:redness (code of your own)",)


def test_the_peak_holds_the_rewards(tiny: list[str], scenes_field: str) -> None:
    changes = [*tiny, f"policy.field={scenes_field}"]
    with_network, without = (
        recipes.load("t2i_flow_grpo_fast", [*changes, f"reward.weights={{{name}: 1}}"])
        for name in ("pickscore", "brightness")
    )
    planner = Planner(without)
    peaks = [planner.estimate(config).memory.peak for config in (with_network, without)]
    assert peaks[0] - peaks[1] == 4 * H


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), pytest.param("float32", 4, marks=pytest.mark.slow)])
def test_text_encoders_stay_until_they_are_released(dtype: str, width: int) -> None:
    changes = [f"policy.field.weights={dtype}", "reward.settings.pickscore.offload=true"]
    parts, said = {}, {}
    for released in ("false", "true"):
        config = recipes.load("sd35_24gb", [*changes, f"policy.field.release_encoders={released}"])
        planner = Planner(config)
        bare, _ = planner.traced(checkpointing=True)
        parts[released] = _staying(config, bare, planner.shape(config).update, 1)
        said[released] = " ".join(not_counted(config, bare))
        assert parts[released]["rewards"] == 0
    assert parts["false"].pop("text encoders") == width * sum(SD3.values())
    assert parts["true"].pop("text encoders") == 0
    assert parts["false"] == parts["true"]
    assert "text encoders" not in said["false"]
    assert "text encoders" in said["true"]


def clip(text: tuple[int, ...], vision: tuple[int, ...], shared: int) -> transformers.CLIPConfig:
    """Of (width, layers, heads) of each tower."""
    towers = [
        {
            "hidden_size": w,
            "intermediate_size": 4 * w,
            "num_hidden_layers": d,
            "num_attention_heads": h,
            "projection_dim": shared,
        }
        for w, d, h in (text, vision)
    ]
    vision_config = towers[1] | {"patch_size": 14}
    return transformers.CLIPConfig(text_config=towers[0], vision_config=vision_config, projection_dim=shared)


def test_the_numbers_are_those_of_the_published_architectures() -> None:
    """Of the configurations on the hub, from their few numbers."""
    small, large = clip((768, 12, 12), (1024, 24, 16), 768), clip((1024, 24, 16), (1280, 32, 16), 1024)
    wide = clip((1280, 32, 20), (1280, 32, 20), 1280).text_config
    gated = {"d_ff": 10240, "feed_forward_proj": "gated-gelu"}
    t5 = transformers.T5Config(vocab_size=32128, d_model=4096, d_kv=64, num_layers=24, num_heads=64, **gated)
    umt5 = transformers.UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, num_layers=24, num_heads=64, **gated)
    swin = transformers.SwinConfig(
        image_size=384, depths=[2, 2, 18, 2], window_size=7, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    with torch.device("meta"):
        made = [
            (L, transformers.CLIPModel(small)),
            (H, transformers.CLIPModel(large)),
            (
                DETECTOR,
                transformers.Mask2FormerForUniversalSegmentation(
                    transformers.Mask2FormerConfig(backbone_config=swin, num_labels=80)
                ),
            ),
            (SD3["text_encoder"], transformers.CLIPTextModelWithProjection(small.text_config)),
            (SD3["text_encoder_2"], transformers.CLIPTextModelWithProjection(wide)),
            (SD3["text_encoder_3"], transformers.T5EncoderModel(t5)),
            (UMT5_XXL, transformers.UMT5EncoderModel(umt5)),
            (FLUX["text_encoder"], transformers.CLIPTextModel(small.text_config)),
        ]
    for number, network in made:
        assert sum(p.numel() for p in network.parameters()) == number, type(network).__name__


def test_the_command_shows_them(tiny: list[str], scenes_field: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "plan",
        "t2i_flow_grpo_fast",
        *tiny,
        f"policy.field={scenes_field}",
        "reward.weights={pickscore: 1, hps: 1}",
    ]
    main([*words, "reward.settings.hps.offload=true", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["memory_bytes"]["rewards"], found["memory_bytes"]["text encoders"]) == (4 * H, 0)
    main([*words, "reward.settings.hps.offload=true"])
    said = capsys.readouterr().out
    assert f"Not counted: {found['not_counted'][0]}" in said
    assert "hps" in found["not_counted"][0]


@pytest.mark.parametrize("named", ["settings", "the folder alone"])
def test_a_local_pipeline_is_planned_with_its_encoders(
    named: str, tiny: list[str], tiny_pipeline: Callable[..., Path]
) -> None:
    """Weights and VAE are those of the pipeline; the peak falls by its text encoders once they are released."""
    folder = str(tiny_pipeline("sd3"))
    field = folder if named != "settings" else f"{{name: pretrained, checkpoint: {folder}, lora: 4}}"
    base = [*tiny, "policy.grid=uniform", "policy.frozen=", "steps=all_but_last", "reward.weights={brightness: 1}"]
    config = recipes.load("t2i_flow_grpo", [*base, f"policy.field={field}"])
    found = Planner(config).estimate(config).memory
    pipe = pretrained(folder).adapter.pipe
    encoders = [getattr(pipe, name) for name in SD3]
    assert found.staying["text encoders"] == sum(_bytes(encoder, buffers=False) for encoder in encoders)
    assert found.staying["VAE"] == _bytes(pipe.vae)
    if named != "settings":
        assert found.staying["weights, trained"] == _bytes(pipe.transformer, buffers=False)
        return
    assert found.staying["weights, frozen"] == _bytes(pipe.transformer)
    released = recipes.load("t2i_flow_grpo", [*base, f"policy.field={field}", "policy.field.release_encoders=true"])
    less = Planner(released).estimate(released).memory
    assert found.peak - less.peak == found.staying["text encoders"]


def _bytes(module: torch.nn.Module, buffers: bool = True) -> int:
    """Of weights, and of buffers that a file holds."""
    stored = [*module.parameters(), *(module.buffers() if buffers else [])]
    return sum(v.numel() * v.element_size() for v in stored)
