"""The size of a ReinFlow iteration that is timed, ours and the peer's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Shapes of a ReinFlow iteration on Hopper."""

    num_envs: int = 40
    num_chunks: int = 50
    chunk: int = 4
    width: int = 256
    depth: int = 3
    num_steps: int = 4  # denoising steps
    num_minibatches: int = 2
    epochs: int = 5


PAPER = Size(num_chunks=500, width=512, num_minibatches=10)
"""The published Hopper setting (Zhang et al., 2025); minibatches of 2,000 chunks."""
