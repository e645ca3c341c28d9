"""Small random policies of the real LeRobot, to try things on: a SmolVLA and an EO-1 in folders that LeRobot opens like
any other, pi0 and pi0.5 with the widths of their towers changed. Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn as nn
from torch import Tensor

SPECIAL = ["<pad>", "<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>"]
WIDTH = 32


def features(image: int, state: int, actions: int, cameras: tuple[str, ...] = ("top",)) -> dict[str, Any]:
    """`input_features` and `output_features` of a config: pictures, a state, actions."""
    from lerobot.configs.types import FeatureType, PolicyFeature

    seen = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, image, image)) for name in cameras}
    seen |= {"observation.state": PolicyFeature(FeatureType.STATE, (state,))}
    return {"input_features": seen, "output_features": {"action": PolicyFeature(FeatureType.ACTION, (actions,))}}


def batch(rows: int, image: int = 64, state: int = 6) -> dict[str, Tensor]:
    """What a preprocessor makes: a picture in [0, 1], token numbers, a mask and the state."""
    tokens = torch.randint(5, 90, (rows, 6))
    return {
        "observation.images.top": torch.rand(rows, 3, image, image),
        "observation.state": torch.randn(rows, state),
        "observation.language.tokens": tokens,
        "observation.language.attention_mask": tokens > 20,
    }


def _bytewise(special: list[str], **named: str) -> Any:
    """A tokenizer that knows every text, letter by letter; `special` begins with the one that fills up."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=special[0], extra_special_tokens=named)
    made.add_special_tokens({"additional_special_tokens": special[1:]})
    return made


def write_vlm(folder: Path, image: int = 64, width: int = 48, layers: int = 2) -> Path:
    """A vision-language model's configuration and processor, without weights, as `vlm_model_name` finds them."""
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    text: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    text |= {"num_key_value_heads": 2, "head_dim": width // 4, "vocab_size": 300, "model_type": "llama"}
    vision = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": image}
    config = SmolVLMConfig(text_config=text, vision_config=vision | {"patch_size": image // 4}, scale_factor=2)
    config.save_pretrained(folder)
    named = {"fake_image_token": SPECIAL[1], "global_image_token": SPECIAL[2], "image_token": SPECIAL[3]}
    named |= {"end_of_utterance_token": SPECIAL[4]}
    parts = SmolVLMImageProcessor(), _bytewise(SPECIAL, **named), SmolVLMVideoProcessor(size={"longest_edge": image})
    SmolVLMProcessor(*parts, image_seq_len=4, chat_template="x").save_pretrained(folder)
    return folder


def smolvla(
    folder: Path, *, chunk: int = 8, n_action_steps: int = 4, image: int = 64, state: int = 6, actions: int = 6,
    stats: Mapping[str, Mapping[str, Tensor]] | None = None, **settings: Any,
) -> Any:  # fmt: skip
    """A random SmolVLA, saved into `folder` with its processors; settings are those of its config."""
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors

    asked: dict[str, Any] = {"num_steps": 4, "num_vlm_layers": 2, "load_vlm_weights": False, "device": "cpu"}
    asked |= {"tokenizer_max_length": 24, "max_state_dim": 8, "max_action_dim": 8, "push_to_hub": False}
    asked |= {"chunk_size": chunk, "n_action_steps": n_action_steps, "resize_imgs_with_padding": (image, image)}
    asked |= features(image, state, actions) | {"vlm_model_name": str(write_vlm(folder / "vlm", image))} | settings
    policy = SmolVLAPolicy(SmolVLAConfig(**asked))
    policy.save_pretrained(folder)
    known = {"observation.state": _unit(state), "action": _unit(actions)} if stats is None else dict(stats)
    for part in make_smolvla_pre_post_processors(policy.config, known):
        part.save_pretrained(folder)
    return policy


def _unit(num: int) -> dict[str, Tensor]:
    """Statistics under which nothing changes."""
    return {"mean": torch.zeros(num), "std": torch.ones(num), "min": -torch.ones(num), "max": torch.ones(num)}


@contextmanager
def narrow(module: ModuleType, image: int = 64) -> Iterator[None]:
    """Inside, the towers of modeling_pi0 or modeling_pi05 are WIDTH wide in place of 2048 and 1024.

    LeRobot sets the projector of the pictures to 2048 whatever the configuration says: it is set back on the way.
    """
    from transformers import GemmaConfig, PaliGemmaConfig

    vision = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 32}
    small = {"width": WIDTH, "depth": 2, "mlp_dim": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    whole = module.PaliGemmaForConditionalGenerationWithPiGemma

    def projected(config: Any) -> nn.Module:
        config.vision_config.projection_dim, config.vision_config.intermediate_size = WIDTH, 64
        made: nn.Module = whole(config=config)
        return made

    known = {"paligemma": lambda: PaliGemmaConfig(vision_config=vision | {"image_size": image}), "gemma": GemmaConfig}
    with (
        mock.patch.object(module, "CONFIG_MAPPING", known),
        mock.patch.object(module, "get_gemma_config", return_value=module.GemmaConfig(**small)),
        mock.patch.object(module, "PaliGemmaForConditionalGenerationWithPiGemma", projected),
    ):
        yield


def pi(version: str, image: int = 64, **settings: Any) -> Any:
    """A random pi0 ("pi0") or pi0.5 ("pi05"), to be made, saved and opened inside `narrow`."""
    from importlib import import_module

    name = version.upper()
    config = getattr(import_module(f"lerobot.policies.{version}.configuration_{version}"), f"{name}Config")
    policy = getattr(import_module(f"lerobot.policies.{version}.modeling_{version}"), f"{name}Policy")
    asked = {"chunk_size": 8, "n_action_steps": 4, "device": "cpu", "dtype": "float32", "num_inference_steps": 4}
    return policy(config(**features(image, 6, 6), **asked, image_resolution=(image, image), **settings))


EO1_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
EO1_SPECIAL += ["<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
)


def write_qwen(folder: Path, width: int = WIDTH, layers: int = 2) -> dict[str, Any]:
    """The processor of a Qwen2.5-VL, as `vlm_base` finds it; returns the model's configuration."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    text: dict[str, Any] = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": layers}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision: dict[str, Any] = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": 64, "num_heads": 2}
    vision |= {"out_hidden_size": width, "fullatt_block_indexes": [0], "window_size": 56}
    named = ("vision_start", "vision_end", "image", "video")
    ids = {f"{name}_token_id": EO1_SPECIAL.index(w) for name, w in zip(named, EO1_SPECIAL[3:], strict=True)}
    parts = Qwen2VLImageProcessor(), _bytewise(EO1_SPECIAL), Qwen2VLVideoProcessor()
    Qwen2_5_VLProcessor(*parts, chat_template=TEMPLATE).save_pretrained(folder)
    found: dict[str, Any] = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids).to_dict()
    return found


def eo1(
    folder: Path, *, image: int = 56, state: int = 6, actions: int = 6,
    stats: Mapping[str, Mapping[str, Tensor]] | None = None, **settings: Any,
) -> Any:  # fmt: skip
    """A random EO-1, saved into `folder` with its processors; settings are those of its config."""
    from lerobot.policies.eo1.configuration_eo1 import EO1Config
    from lerobot.policies.eo1.modeling_eo1 import EO1Policy
    from lerobot.policies.eo1.processor_eo1 import make_eo1_pre_post_processors

    asked: dict[str, Any] = {"dtype": "float32", "device": "cpu", "push_to_hub": False, "num_denoise_steps": 4}
    asked |= {"image_min_pixels": 28 * 28, "image_max_pixels": image**2, "max_state_dim": 8, "max_action_dim": 8}
    asked |= {"vlm_base": str(folder / "vlm"), "vlm_config": write_qwen(folder / "vlm"), "n_action_steps": 4}
    asked |= features(image, state, actions) | settings
    policy = EO1Policy(EO1Config(pretrained_path=folder, **asked)).eval()  # of its configuration, without weights
    policy.config.pretrained_path = None
    policy.save_pretrained(folder)
    known = {"observation.state": _unit(state), "action": _unit(actions)} if stats is None else dict(stats)
    for part in make_eo1_pre_post_processors(policy.config, known):
        part.save_pretrained(folder)
    return policy
