"""Published models at our border: diffusers' text-to-image families, their LoRA, LeRobot's policies."""

from rlflow.models.pretrained.pipeline import pretrained

__all__ = ["pretrained"]
