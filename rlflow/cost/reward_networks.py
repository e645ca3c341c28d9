"""What the networks of a recipe's rewards take on the card: known by their numbers, none is loaded.

    bytes = parameters x bytes of a number, once for each network that is loaded

Rewards that name the same CLIP share one; every use of geneval loads a detector of its own. What no size is known for,
and what lies on the card for a moment only, is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlflow import registry
from rlflow.config.limits import select_rewards
from rlflow.config.schema import Config

NETWORKS = {
    "clip_score": ("model",),
    "pickscore": ("model",),
    "aesthetic": ("model",),
    "hps": ("base",),
    "image_similarity": ("model",),
    "geneval": ("detector", "clip"),
}
"""Settings of each reward that name its networks; other registered rewards have nothing on the card worth counting."""
PARAMETERS = {
    "openai/clip-vit-large-patch14": 427_616_513,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": 986_109_441,
    "yuvalkirstain/PickScore_v1": 986_109_441,
    "facebook/mask2former-swin-small-coco-instance": 68_741_083,
}
"""By the name on the hub: what transformers makes of the published configuration."""


@dataclass(frozen=True)
class RewardNetworks:
    """Bytes that lie on the card all the time, and what is not among them."""

    bytes: float
    not_counted: tuple[str, ...]


def reward_networks(config: Config) -> RewardNetworks:
    """Of all that `reward.weights`, `eval.metrics` and `policy.select` name."""
    sizes: dict[Any, float] = {}
    unknown: dict[str, None] = {}
    for use, spec in enumerate(_specs(config)):
        name = spec["name"]
        if ":" in name:
            unknown[f"{name} (code of your own)"] = None
        for setting in NETWORKS.get(name, ()):
            chosen = _defaults(name) | spec
            source = chosen[setting]
            if chosen["device"] == "cpu":
                continue
            if chosen["offload"]:
                unknown[f"{name} ({source} while it scores)"] = None
            elif source not in PARAMETERS:
                unknown[f"{name} ({source}: size not known)"] = None
            else:
                sizes[_same(use, setting), source, chosen["precision"]] = PARAMETERS[source] * _width(chosen)
    return RewardNetworks(sum(sizes.values()), tuple(unknown))


def _specs(config: Config) -> Iterator[dict[str, Any]]:
    """One for each time a reward is made; of a rank that of the reward it ranks."""
    for name in (*config.reward.weights, *config.eval.metrics.values(), *select_rewards(config)):
        spec = {"name": name, **config.reward.settings.get(name, {})}
        while spec["name"] == "group_rank":
            spec = {"name": spec["of"], **(spec.get("settings") or {})}
        yield spec


def _defaults(name: str) -> dict[str, Any]:
    return {key: p.default for key, p in registry.settings(registry.find("reward", name)).items()}


def _same(use: int, setting: str) -> Any:
    """Equal for networks that are one where they come from one source."""
    return {"detector": use, "base": "hps"}.get(setting, "clip")


def _width(settings: Mapping[str, Any]) -> int:
    """Bytes of a number."""
    return torch.empty(0, dtype=getattr(torch, settings["precision"])).element_size()
