"""The numbers of the recipes of large models are the published ones, and rewards find their columns in the prompts."""

import codecs
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from rlflow import registry
from rlflow.assembly.environment import heldout_prompts
from rlflow.config import recipes
from rlflow.envs.prompts import load_prompts
from rlflow.rewards.component import column_names
from rlflow.train.table import read_table

# -- published numbers ----------------------------------------------------------------------------

GROUP_STD = {"name": "group", "std": "group", "unbiased": True, "eps": 1e-8}
ADAMW = {"algorithm.optimizer.betas": (0.9, 0.999), "algorithm.optimizer.weight_decay": 1e-4}
ADAMW |= {"algorithm.optimizer.max_grad_norm": 1.0, "algorithm.optimizer.warmup": 0, "algorithm.epochs": 1}

FLOW_GRPO: dict[str, Any] = ADAMW | {
    "policy.field.checkpoint": "stabilityai/stable-diffusion-3.5-medium",
    "policy.field.resolution": 512,
    "policy.field.lora": 32,
    "policy.kernel": {"name": "flow_sde", "a": 0.7},
    "policy.solver": "euler",
    "policy.grid": "scheduler",  # with the shift of the checkpoint
    "policy.num_steps": 10,
    "policy.guidance": {"name": "cfg", "scale": 4.5},
    "steps": {"name": "all_but_last", "skip_last": 2},  # published: all but the last; the one before it has no noise
    "advantage": {"name": "group", "std": "epoch", "eps": 1e-4},
    "env.num_groups": 48,
    "env.group_size": 24,
    "env.shared_noise": False,
    "algorithm.objective": {"name": "clip", "low": 1e-4},
    "algorithm.num_minibatches": 2,
    "algorithm.kl.beta": 0.04,
    "algorithm.kl.kind": "released",
    "algorithm.ema_decay": pytest.approx(0.9 ** (1 / 8), abs=1e-4),  # .9 every 8
    "algorithm.optimizer.lr": 3e-4,
    "eval.num_steps": 40,
    "eval.solver": None,
    "eval.every": 60,
}
MIX_GRPO = {
    "policy.num_steps": 25,
    "steps": {"name": "window", "size": 4, "every": 25, "stride": 1, "skip_last": 2},
    "advantage": GROUP_STD,
    "env.group_size": 12,
    "env.shared_noise": True,
    "algorithm.kl.beta": 0.0,
}
FAST = {  # with the groups of the release's run on one GPU
    "policy.kernel": {"name": "cps", "eta": 0.8},
    "policy.guidance": None,
    "steps": {"name": "random_window", "size": 3, "stop": 5},
    "env.num_groups": 8,
    "env.group_size": 8,
    "algorithm.objective": {"name": "clip", "low": 1e-5},
    "algorithm.kl.beta": 0.0,
}
FLUX: dict[str, Any] = (
    ADAMW
    | MIX_GRPO
    | {
        "policy.field": {
            "name": "pretrained",  # without lora: the whole network, in float32
            "checkpoint": "black-forest-labs/FLUX.1-dev",
            "resolution": 720,
            "embedded_guidance": 3.5,
        },
        "policy.kernel": {"name": "flow_sde", "a": 0.7},
        "policy.solver": "euler",
        "policy.grid": {"name": "shifted", "shift": 3.0},
        "policy.guidance": None,
        "env.num_groups": 32,  # one for each GPU
        "reward.weights": {"hps": 1.0, "pickscore": 1.0},  # published: ImageReward too
        "reward.normalize": "advantage",
        "algorithm.objective": {"name": "clip", "low": 1e-4},
        "algorithm.num_minibatches": 4,  # 12 samples of a group, 3 accumulated
        "algorithm.optimizer.lr": 1e-5,
        "train.iterations": 300,
        "eval.num_steps": 28,
    }
)
DANCE = {
    "policy.kernel": {"name": "constant_sde", "eta": 0.3},
    "policy.num_steps": 16,
    "steps": {"name": "fraction", "fraction": 0.6},
    "env.num_groups": 16,  # one for each GPU
    "reward.weights": {"hps": 1.0},
    "reward.normalize": "none",
    "algorithm.num_minibatches": 2,  # published: 3
}
FLASH = {
    "policy.solver": "dpm2m",
    "steps": {"name": "window", "size": 4, "every": 20, "stride": 1, "skip_last": 2, "compress": 0.4},
    "eval.solver": "euler",
}
NFT = {
    "policy.solver": "dpm2m",
    "policy.guidance": None,
    "steps": "none",
    "likelihood": {"name": "cfm", "draws": 9, "joint": False, "on_grid": True},
    "algorithm.objective": {"name": "nft", "beta": 1.0, "old_rate": 0.001, "old_max": 0.5},
    "algorithm.num_minibatches": 1,
    "algorithm.kl.beta": 1e-4,
    "algorithm.kl.kind": "exact",
    "algorithm.ema_decay": 0.9,
    "eval.solver": "dpm2m",
}
AWM = {  # of the release: six draws of the sampler's own times, a clip of 1, velocity KL .003; the trust term's place is ours
    "likelihood": {"name": "cfm", "draws": 6, "joint": False, "on_grid": True}
    | {"supervise": "sample", "stratified": True, "normalize": True},
    "algorithm.objective": "awm",
    "algorithm.kl.beta": 3e-3,
}
KLEIN = {
    "policy.field.checkpoint": "black-forest-labs/FLUX.2-klein-base-4B",
    "policy.field.max_sequence_length": 512,  # its padding is text
}
WAN = {  # ours: MixGRPO's window, and Flow-GRPO's guidance, on videos
    "policy.field.checkpoint": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "policy.field.resolution": 240,
    "policy.num_steps": 20,
    "steps": {"name": "window", "size": 4, "every": 25, "stride": 1, "skip_last": 1},
    "env.num_groups": 16,
    "reward.weights": {"pickscore": 1.0},
    "reward.frames": 4,
    "eval.num_steps": 50,
    "eval.solver": "unipc",  # as it ships
    "eval.every": 25,
}
DPPO = {"algorithm.objective": {"name": "flow_dppo", "delta": 1e-5}}
DRAFT = {
    "policy.guidance": None,
    "policy.grad_checkpointing": True,
    "steps": "none",
    "algorithm.name": "reward_gradient",
    "algorithm.through": {"name": "last_n", "n": 1},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd35_draft": DRAFT | {"reward.weights": {"pickscore": 1.0}},
    "sd35_flow_grpo_geneval": FLOW_GRPO | {"reward.weights": {"geneval_soft": 1.0}, "env.prompts": "geneval"},
    "sd35_flow_grpo_ocr": FLOW_GRPO | {"reward.weights": {"ocr": 1.0}, "env.prompts": "signs"},
    "sd35_mixgrpo_pickscore": FLOW_GRPO | MIX_GRPO | {"reward.weights": {"pickscore": 1.0}},
    "sd35_24gb": FLOW_GRPO | FAST | {"reward.weights": {"pickscore": 1.0}},
    "sd35_nft": FLOW_GRPO | NFT | {"reward.weights": {"geneval_soft": 1.0}},
    "sd35_awm": FLOW_GRPO | NFT | AWM | {"reward.weights": {"geneval_soft": 1.0}},
    "sd35_flow_dppo": FLOW_GRPO | DPPO | {"reward.weights": {"geneval_soft": 1.0}, "env.prompts": "geneval"},
    "klein_nft": FLOW_GRPO | NFT | KLEIN | {"reward.weights": {"geneval_soft": 1.0}},
    "klein_flow_grpo_fast": FLOW_GRPO | FAST | KLEIN | {"env.num_groups": 24, "env.group_size": 16},
    "zimage_nft": FLOW_GRPO | NFT | {"policy.field.checkpoint": "Tongyi-MAI/Z-Image"},
    "qwen_image_nft": FLOW_GRPO
    | NFT
    | {"policy.field.checkpoint": "Qwen/Qwen-Image-2512", "reward.weights": {"ocr": 1.0}},
    "wan_mixgrpo": FLOW_GRPO | MIX_GRPO | WAN,
    "flux_draft": DRAFT | {"policy.field.embedded_guidance": 3.5, "reward.weights": {"pickscore": 1.0}},
    "flux_mixgrpo": FLUX,
    "flux_mixgrpo_flash": FLUX | FLASH,
    "flux_dance_grpo": FLUX | DANCE,
}
"""By recipe what it must say: the papers and the released configs, ours where a comment says so."""


def setting(values: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_the_published_ones(name: str) -> None:
    """Whoever changes one changes the table too, and knows why."""
    values = asdict(recipes.load(name))
    found = {path: setting(values, path) for path in PUBLISHED[name]}
    assert found == PUBLISHED[name]


def test_every_recipe_of_a_published_model_is_in_the_table() -> None:
    of_papers = [
        name for name in PUBLISHED if not name.startswith(("klein", "zimage", "qwen", "wan"))
    ]  # those are ours
    assert sorted(of_papers) == [name for name in recipes.names() if name.startswith(("sd35_", "flux_"))]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("sd35_")])
def test_a_lora_has_twice_its_rank_as_alpha_and_is_on_the_attention(name: str, tiny_pipeline: Callable) -> None:
    small = {"checkpoint": str(tiny_pipeline("sd3")), "resolution": 32, "max_sequence_length": 12}
    field = registry.build("model", "policy.field", recipes.load(name).policy.field | small)
    (lora,) = field.transformer.peft_config.values()
    assert (lora.r, lora.lora_alpha) == (32, 64)
    trained = [name for name, parameter in field.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".attn" in name for name in trained)


# -- columns --------------------------------------------------------------------------------------

OF_IMAGES = [name for name in recipes.names() if recipes.read(name).get("env", {}).get("name", "prompt") == "prompt"]
OURS = {"images", "group"}


def columns_of(reward: str, settings: dict[str, dict[str, Any]]) -> set[str]:
    """What a reward reads; a class is asked and not made, since making it loads a network."""
    found: Any = registry.find("reward", settings.get(reward, {}).get("name", reward))
    return set(column_names(found.__call__)) - {"self"} if isinstance(found, type) else set(column_names(found))


@pytest.mark.parametrize("name", OF_IMAGES)
def test_rewards_and_metrics_find_their_columns_in_the_prompts(name: str) -> None:
    config = recipes.load(name)
    train, heldout = load_prompts(config.env.prompts), heldout_prompts(config)
    for reward in config.reward.weights:
        assert columns_of(reward, config.reward.settings) <= OURS | set(train.columns), reward
    for metric in config.eval.metrics.values():
        assert columns_of(metric, config.reward.settings) <= OURS | {"base_images"} | set(heldout.columns), metric


def test_prompts_of_another_kind_lack_columns() -> None:
    """The check above is not of nothing."""
    scenes = OURS | set(load_prompts("scenes").columns)
    settings = recipes.load("sd35_flow_grpo_geneval").reward.settings
    assert columns_of("geneval_soft", settings) - scenes == {"tag", "include", "exclude"}
    assert columns_of("ocr", {}) - scenes == {"text"}


class TestFilesOfTheUser:
    def test_a_byte_order_mark_is_no_part_of_a_recipe(self, tmp_path):
        (tmp_path / "mine.yaml").write_bytes(codecs.BOM_UTF8 + "about: größer\nbase: t2i_nft\n".encode())
        assert recipes.read(str(tmp_path / "mine.yaml"))["about"] == "größer"

    def test_another_encoding_is_named(self, tmp_path):
        (tmp_path / "mine.yaml").write_text("about: größer", encoding="latin-1")
        with pytest.raises(ValueError, match=r"mine\.yaml is not UTF-8 \(byte 0xf6 in line 1"):
            recipes.read(str(tmp_path / "mine.yaml"))

    def test_of_a_table_too(self, tmp_path):
        (tmp_path / "t.yaml").write_text("runs: {}", encoding="utf-16")
        with pytest.raises(ValueError, match=r"t\.yaml is UTF-16"):
            read_table(tmp_path / "t.yaml")
