"""LAION's aesthetic predictor: how much would people like the picture, 1 to 10? (Schuhmann et al., arXiv:2210.08402)

    score = head(e(image))        e: unit vector of CLIP-L/14, head: linear layers, one after the other

Version 2 (sac+logos+ava1-l14-linearMSE.pth) has five layers with dropout and no activations between them, so in
evaluation it is one affine map; version 1 has one layer. Both are read: `head` is the file, of which this package
ships none.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import torch.nn as nn
from torch import Tensor

from rlflow.registry import SettingError
from rlflow.rewards.component import differentiable
from rlflow.rewards.networks.embed import load_clip
from rlflow.rewards.networks.hub import Precision, Source, read_weights


@differentiable
class Aesthetic:
    """How much people would like the picture, about 1 to 10 (LAION's predictor on CLIP-L)."""

    def __init__(
        self,
        head: str,
        model: str = "openai/clip-vit-large-patch14",
        device: str = "auto",
        offload: bool = False,
        precision: Precision = "float32",
    ):
        if not Path(head).is_file():
            raise SettingError("head", f"{head!r}: no such file; give LAION's sac+logos+ava1-l14-linearMSE.pth")
        self.head = linear_layers(read_weights(Path(head)))
        source = Source(model, "model")
        self.clip = load_clip(source, source, device, offload, precision)
        wants, has = self.head[0].in_features, self.clip.network.network.config.projection_dim
        if wants != has:
            raise SettingError("head", f"{head!r} reads vectors of {wants} numbers, model {model!r} makes {has}")

    def __call__(self, images: Tensor) -> Tensor:
        """(N,) score."""
        vectors = self.clip.images(images)
        return self.head.to(vectors.device)(vectors).squeeze(-1)


def linear_layers(weights: dict[str, Tensor]) -> nn.Sequential:
    """Linear layers in the order of the numbers in their names; ValueError where one does not fit the next."""
    names = sorted((n for n in weights if n.endswith("weight")), key=lambda n: [int(d) for d in re.findall(r"\d+", n)])
    layers = []
    for name in names:
        out_features, in_features = weights[name].shape
        layer = nn.Linear(in_features, out_features)
        layer.load_state_dict({"weight": weights[name], "bias": weights[name.removesuffix("weight") + "bias"]})
        layers.append(layer)
    sizes = [(layer.in_features, layer.out_features) for layer in layers]
    if not layers or sizes[-1][1] != 1 or any(a[1] != b[0] for a, b in pairwise(sizes)):
        raise ValueError(f"the head's layers {sizes} do not lead from a vector to one number")
    return nn.Sequential(*layers).eval().requires_grad_(False)
