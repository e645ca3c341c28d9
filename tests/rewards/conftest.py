"""Tiny random checkpoints in the folders that real ones come in, made on the spot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

SIDE, LENGTH, WIDTH = 32, 16, 32
"""Pixels, tokens and projected numbers of the tiny CLIP."""


def byte_vocabulary() -> dict[str, int]:
    """CLIP's vocabulary without merges: every byte, alone and at the end of a word, and two special tokens."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shown = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    words = [*shown, *(c + "</w>" for c in shown), "<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


def clip_config() -> Any:
    from transformers import CLIPConfig

    vocabulary = len(byte_vocabulary())
    tower = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    tower |= {"projection_dim": WIDTH, "hidden_act": "gelu"}
    special = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    text = tower | special | {"vocab_size": vocabulary, "max_position_embeddings": LENGTH}
    vision = tower | {"image_size": SIDE, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP with tokenizer and preprocessor, as `save_pretrained` writes it."""
    pytest.importorskip("transformers")
    from transformers import CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(byte_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": SIDE},
                "crop_size": {"height": SIDE, "width": SIDE},
                "image_mean": [0.4, 0.45, 0.5],
                "image_std": [0.25, 0.3, 0.35],
            }
        )
    )
    torch.manual_seed(0)
    model = CLIPModel(clip_config())
    for parameter in model.parameters():  # the usual start makes all images alike
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def pictures() -> torch.Tensor:
    """(6, 3, 40, 40) in [0, 1]: random blocks of colour on an 8-bit grid."""
    blocks = torch.rand(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    return (blocks.repeat_interleave(8, -1).repeat_interleave(8, -2) * 255).round() / 255
