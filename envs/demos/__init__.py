"""Demonstrations: episodes on disk, and who plays them."""

from rlflow.envs.demos.dataset import Demos, Episode, write_demos

__all__ = ["Demos", "Episode", "write_demos"]
