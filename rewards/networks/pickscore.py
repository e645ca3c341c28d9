"""PickScore: which image would a user pick for this prompt? (Kirstain et al., arXiv:2305.01569)

    score = exp(logit_scale) cos(e(image), e(text))        of a CLIP-H tuned on choices of users

About 17 to 24 on real pictures; Flow-GRPO divides by 26 (`divide: 26`). A difference of 1 means odds of e.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlflow.ranges import Positive
from rlflow.registry import SettingError
from rlflow.rewards.component import differentiable
from rlflow.rewards.networks.embed import load_clip
from rlflow.rewards.networks.hub import Precision, Source


@differentiable
class PickScore:
    """How likely users are to pick the image for the prompt, as a log-odds (PickScore v1)."""

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        divide: Positive = 1.0,
        device: str = "auto",
        offload: bool = False,
        precision: Precision = "float32",
    ):
        if divide == 0:
            raise SettingError("divide", "must not be 0: write 1 for the score as published")
        sources = Source(model, "model"), Source(processor, "processor")
        self.clip = load_clip(*sources, device, offload, precision)
        self.divide = divide

    def __call__(self, images: Tensor, prompt: Sequence[str]) -> Tensor:
        """(N,) log-odds, over `divide`."""
        return self.clip.scale * self.clip.cosine(images, prompt) / self.divide
