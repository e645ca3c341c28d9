"""LeRobot's policies as shapes: a field without storage from published numbers, so that `plan` loads nothing.

The network is LeRobot's own; its vision-language model's configuration, which lies on the hub, is written out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeGuard
from unittest import mock

import torch
from torch import Tensor

from rlflow.models.lerobot.field import LeRobotField
from rlflow.models.lerobot.opening import check_version, wrapped
from rlflow.models.lerobot.tiny import features
from rlflow.types import Tree, num_rows

SMOLVLM2_500M = {
    "text_config": {
        "model_type": "llama",
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "vocab_size": 49280,
    },
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
    "scale_factor": 4,
}


@dataclass(frozen=True)
class Known:
    """Pixels of a side, cameras, numbers of state and action; the rest is SmolVLA's default."""

    image: int
    cameras: tuple[str, ...]
    state: int
    actions: int


KNOWN = {
    "HuggingFaceVLA/smolvla_libero": Known(256, ("image", "image2"), 8, 7),
    "lerobot/smolvla_base": Known(256, ("camera1", "camera2", "camera3"), 6, 6),
}


class NoProcessors:
    """Batches of zeros, whatever is observed."""

    def __init__(self, config: Any):
        self.num_actions = int(config.output_features["action"].shape[0])
        self.shapes = {name: tuple(feature.shape) for name, feature in config.input_features.items()}
        self.words = int(config.tokenizer_max_length)

    def before(self, obs: Tree) -> dict[str, Tensor]:
        """Of as many rows."""
        num = num_rows(obs)
        found = {name: torch.zeros(num, *shape) for name, shape in self.shapes.items()}
        found["observation.language.tokens"] = torch.zeros(num, self.words, dtype=torch.long)
        found["observation.language.attention_mask"] = torch.ones(num, self.words, dtype=torch.bool)
        return found

    def after(self, x: Tensor) -> Tensor:
        """The numbers that are carried out."""
        return x[..., : self.num_actions]

    def example(self) -> dict[str, Tensor]:
        """A batch of three rows."""
        return self.before(torch.zeros(3, 1))


def shape_of(checkpoint: str, settings: Mapping[str, Any]) -> tuple[LeRobotField, Tree]:
    """The field of a recipe's `policy.field` on the meta device, and one row of what it observes; ValueError for a
    policy that is not known."""
    check_version()
    if checkpoint not in KNOWN:
        raise ValueError(f"the numbers of {checkpoint} are not known: plan with one of {sorted(KNOWN)}")
    from lerobot.policies.smolvla import smolvlm_with_expert
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from transformers import SmolVLMConfig

    one = KNOWN[checkpoint]
    numbers = features(one.image, one.state, one.actions, one.cameras) | {"device": "cpu"}
    tokens = SimpleNamespace(fake_image_token_id=49189, global_image_token_id=49152)
    parts = {"AutoConfig": SmolVLMConfig(**SMOLVLM2_500M), "AutoProcessor": SimpleNamespace(tokenizer=tokens)}
    hub = mock.patch.multiple(smolvlm_with_expert, **{n: _giving(part) for n, part in parts.items()})
    with hub, torch.device("meta"):
        policy = SmolVLAPolicy(SmolVLAConfig(**numbers)).eval()
        _without_masks(policy.model.vlm_with_expert.get_vlm_model().vision_model)
        processors: Any = NoProcessors(policy.config)
        field = wrapped(policy, processors, dict(settings) | {"checkpoint": checkpoint}, checkpoint)
    seen: dict[str, Tensor] = {}
    for name, shape in processors.shapes.items():
        kind = torch.uint8 if len(shape) == 3 else torch.float32
        seen[name] = torch.empty(shape, dtype=kind, device="meta")
    return field, seen


def _giving(part: Any) -> Any:
    """Stands in for a class of transformers whose `from_pretrained` would ask the hub."""
    return SimpleNamespace(from_pretrained=lambda name: part)


def _without_masks(vision: Any) -> None:
    """Look at whole pictures, patch by patch; transformers asks the numbers of a mask which patches there are."""

    def forward(pixel_values: Tensor, patch_attention_mask: Any = None) -> Any:
        patches: Tensor = vision.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        h = patches + vision.embeddings.position_embedding.weight
        h = vision.encoder(inputs_embeds=h, attention_mask=None).last_hidden_state
        return SimpleNamespace(last_hidden_state=vision.post_layernorm(h))

    vision.forward = forward


def is_policy(spec: Any) -> TypeGuard[Mapping[str, Any]]:
    """True for a `policy.field` that is LeRobot's, of the hub."""
    found = isinstance(spec, Mapping) and spec.get("name") == "lerobot"
    return found and not Path(str(spec.get("checkpoint"))).is_dir()
