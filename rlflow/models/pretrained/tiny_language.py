"""Tiny pipelines whose text goes through a language model: FLUX.2 klein, Z-Image, Qwen-Image.

Their tokenizer knows every byte, and whole the words of Qwen-Image's template, of which the pipeline drops 34 tokens.
Builders of a tokenizer and of a language model are for other small pipelines too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlflow.models.pretrained.tiny_parts import BLOCKS, SIZES, euler, moved, plain_vae

WIDTH = 16
"""Of a language model, and of a transformer."""
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
INSIDE = "the image by detailing color shape size texture quantity text spatial relationships of objects and background"
FIRST = "system Describe user assistant"
"""Words of Qwen-Image's template with a space before them, and without."""
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if m.content is string else m.content[0].text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Turns of a chat, and an empty thought where none is wanted: what Qwen 3's own template makes of one message."""


def tokenizer(first: Iterable[str] = FIRST.split(), inside: Iterable[str] = INSIDE.split(), chat: str = CHAT) -> Any:
    """Qwen's kind: every byte is a token, and so are words `first`, without a space before them, and `inside`."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*first, *(bytes_to_unicode()[ord(" ")] + word for word in inside)]
    merges = _merges(sorted(words, key=len, reverse=True))  # a shorter word's pairs would break up a longer one
    pieces = [*letters, *dict.fromkeys(left + right for left, right in merges), *MARKS]
    made = Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    made.add_special_tokens({"additional_special_tokens": list(MARKS[1:])})
    made.chat_template = chat
    return made


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Of each word's letters, from the left."""
    return list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))


def qwen3(tokenizer: Any, layers: int, width: int = WIDTH) -> Any:
    """A Qwen 3 with random weights, for `tokenizer`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_text(len(tokenizer), layers, width), head_dim=width // 2)).eval()


def _text(vocabulary: int, layers: int, width: int = WIDTH) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": width, "num_attention_heads": 2, "num_key_value_heads": 1}
    return {**sizes, "vocab_size": vocabulary, "num_hidden_layers": layers, "max_position_embeddings": 4096}


def klein(folder: Path, scheduler: dict[str, Any]) -> Any:
    """FLUX.2 klein-base: its text is of the layers 9, 18 and 27, so there are as many."""
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline(**_flux2(27, scheduler, guidance_embeds=False))


def flux2_dev(folder: Path, scheduler: dict[str, Any]) -> Any:
    """FLUX.2 dev, whose text is of the layers 10, 20 and 30; a Qwen stands in for its Mistral, which sees pictures."""
    from diffusers import Flux2Pipeline

    return Flux2Pipeline(**_flux2(30, scheduler, guidance_embeds=True))


def _flux2(layers: int, scheduler: dict[str, Any], guidance_embeds: bool) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    words = tokenizer()
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 2, 2)}
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 3 * WIDTH}
    vae = AutoencoderKLFlux2(**SIZES, **BLOCKS, latent_channels=4).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return {
        "transformer": moved(Flux2Transformer2DModel(**sizes, **heads, guidance_embeds=guidance_embeds)),
        "scheduler": euler(**{"shift": 3.0, "use_dynamic_shifting": True, **scheduler}),
        "vae": vae,
        "text_encoder": qwen3(words, layers),
        "tokenizer": words,
    }


def z_image(folder: Path, scheduler: dict[str, Any]) -> Any:
    """Z-Image, the base model. Its embedding of time is wide: larger weights would amplify the rounding of time."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    words = tokenizer()
    sizes = {"in_channels": 4, "dim": WIDTH, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    places = {"axes_dims": [4, 2, 2], "axes_lens": [1024, 128, 128]}
    return ZImagePipeline(
        transformer=moved(ZImageTransformer2DModel(**sizes, **places, cap_feat_dim=WIDTH), by=0.02),
        scheduler=euler(**{"shift": 6.0, **scheduler}),
        vae=plain_vae(4),
        text_encoder=Qwen3Model(Qwen3Config(**_text(len(words), 3), head_dim=8)).eval(),
        tokenizer=words,
    )


def qwen_image(folder: Path, scheduler: dict[str, Any]) -> Any:
    """Qwen-Image, whose grid ends at sigma .02."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = tokenizer()
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (4, 2, 2)}
    sizes = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": WIDTH}
    moments = {"latents_mean": torch.randn(4).tolist(), "latents_std": (0.5 + torch.rand(4)).tolist()}
    video = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
    }
    shifts = {"shift": 1.0, "use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9}
    rotary = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6}
    seen = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}
    text = {**_text(len(words), 2), "rope_parameters": rotary}
    return QwenImagePipeline(
        transformer=moved(QwenImageTransformer2DModel(**sizes, **heads)),
        scheduler=euler(**{**shifts, "max_image_seq_len": 8192, **scheduler}),
        vae=AutoencoderKLQwenImage(**video, **moments).eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=seen)).eval(),
        tokenizer=words,
    )
