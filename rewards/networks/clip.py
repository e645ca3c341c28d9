"""CLIPScore: does the image fit the text? (Hessel et al., arXiv:2104.08718)

    score = w max(cos(e(image), e(text)), 0)        w = 2.5

The paper puts "A photo depicts " before captions of photographs; prompts of text-to-image models usually go in as
they are, which is the default here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlflow.ranges import Text
from rlflow.rewards.component import differentiable
from rlflow.rewards.networks.embed import load_clip
from rlflow.rewards.networks.hub import Precision, Source


@differentiable
class ClipScore:
    """How well the image fits the prompt: 2.5 max(cosine, 0) of a CLIP model."""

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        scale: float = 2.5,
        prefix: Text = "",
        device: str = "auto",
        offload: bool = False,
        precision: Precision = "float32",
    ):
        source = Source(model, "model")
        self.clip = load_clip(source, source, device, offload, precision)
        self.scale, self.prefix = scale, prefix

    def __call__(self, images: Tensor, prompt: Sequence[str]) -> Tensor:
        """(N,) in [0, scale]."""
        return self.scale * self.clip.cosine(images, [self.prefix + text for text in prompt]).clamp(min=0)
