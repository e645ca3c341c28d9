"""GPUs by name, for estimates: memory, and dense matrix products per second as their makers publish them."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Memory in GB (1e9 bytes), peak TFLOP/s in bfloat16 and in float32."""

    name: str
    gigabytes: float
    bfloat16: float
    float32: float

    def peak(self, precision: str) -> float:
        """FLOP/s of a network in `precision`."""
        return 1e12 * (self.bfloat16 if precision == "bfloat16" else self.float32)


KNOWN = (
    GPU("rtx3060", 12, 51, 12.7),
    GPU("t4", 16, 65, 8.1),
    GPU("rtx4090", 24, 165, 82.6),
    GPU("rtx3090", 24, 71, 35.6),
    GPU("l4", 24, 121, 30.3),
    GPU("rtx5090", 32, 209, 104.8),
    GPU("a100-40gb", 40, 312, 19.5),
    GPU("l40s", 48, 362, 91.6),
    GPU("a100", 80, 312, 19.5),
    GPU("h100", 80, 989, 67),
    GPU("h200", 141, 989, 67),
    GPU("b200", 180, 2250, 75),
)


def find_gpu(text: str) -> GPU:
    """A name of the table, or a memory size such as 24GB, which computes like the first of at least that size."""
    name = text.strip().lower().replace(" ", "")
    for gpu in KNOWN:
        if gpu.name == name:
            return gpu
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(?:gb|g|gib)?", name)
    if size is None or float(size[1]) <= 0:
        raise ValueError(f"--gpu {text!r}: give a memory size as in 24GB, or one of {', '.join(g.name for g in KNOWN)}")
    gigabytes = float(size[1])
    like = next((gpu for gpu in KNOWN if gpu.gigabytes >= gigabytes), KNOWN[-1])
    return GPU(f"{gigabytes:g} GB, computing like {like.name}", gigabytes, like.bfloat16, like.float32)
