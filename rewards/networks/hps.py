"""HPSv2.1: human preference of an image for a prompt (Wu et al., arXiv:2306.09341).

    score = cos(e(image), e(text))        of a CLIP-H tuned on rankings of people

The checkpoint (HPS_v2.1_compressed.pt) is in open_clip's layout: attention's three matrices stacked, projections
transposed. `convert` renames it for transformers' CLIPModel; shape, tokenizer and preprocessor are those of `base`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rlflow.registry import SettingError
from rlflow.rewards.component import differentiable
from rlflow.rewards.networks.embed import Clip, read_processor
from rlflow.rewards.networks.hub import OnDevice, Precision, Source, need_transformers, read_weights

FILE = "HPS_v2.1_compressed.pt"

TOWERS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # so spelt there
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "transformer.resblocks": "text_model.encoder.layers",
    "logit_scale": "logit_scale",
}
"""Beginning of a name in open_clip -> in transformers."""
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
ATTENTION = re.compile(r"(.*)\.attn\.in_proj_(weight|bias)")


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under the names of transformers' CLIPModel; ValueError names one of another architecture."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name == "attn_mask":  # a constant
            continue
        if name in PROJECTIONS:
            out[PROJECTIONS[name]] = value.T.contiguous()
        elif found := ATTENTION.fullmatch(name):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                out[f"{_renamed(found[1])}.self_attn.{part}_proj.{found[2]}"] = rows.clone()
        else:
            out[_renamed(name)] = value
    return out


def _renamed(name: str) -> str:
    for theirs, ours in TOWERS.items():
        if name == theirs or name.startswith(theirs + "."):
            rest = name[len(theirs) :]
            inside = next((k for k in LAYER if f".{k}." in rest), None)
            return ours + (rest.replace(inside, LAYER[inside]) if inside else rest)
    raise ValueError(f"{name!r} is no weight of open_clip's CLIP: give {FILE}, or another model of its layout")


@functools.cache
def load_hps(checkpoint: Path, base: Source, device: str, offload: bool, precision: Precision) -> Clip:
    """The converted model, the same one for every reward that asks alike."""
    transformers = need_transformers()
    config = base.load(transformers.AutoConfig.from_pretrained, "config.json of a CLIP")
    if not isinstance(config, transformers.CLIPConfig):
        raise SettingError(base.setting, f"{base.name!r} is a {config.model_type}, no clip")
    network = transformers.CLIPModel(config)
    weights = convert(read_weights(checkpoint))
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if other := [name for name, value in weights.items() if shapes.get(name, value.shape) != tuple(value.shape)]:
        raise SettingError(
            "checkpoint", f"{checkpoint} is of another size than base {base.name!r}: {sorted(other)[:3]}"
        )
    missing, unexpected = network.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("position_ids")]  # a constant
    if missing or unexpected:
        lacks = f"it lacks {sorted(missing)[:3]} and brings {sorted(unexpected)[:3]}"
        raise SettingError("checkpoint", f"{checkpoint} does not fit base {base.name!r}: {lacks}")
    return Clip(OnDevice(network, device, offload, precision), *read_processor(base, network.config))


@differentiable
class HPS:
    """How much people prefer the image for the prompt: a cosine, about .2 to .35 (HPSv2.1)."""

    def __init__(
        self,
        checkpoint: str = "xswu/HPSv2",
        base: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str = "auto",
        offload: bool = False,
        precision: Precision = "float32",
    ):
        given = Path(checkpoint)
        path = given if given.is_file() else Source(checkpoint, "checkpoint").file(FILE)
        self.clip = load_hps(path, Source(base, "base"), device, offload, precision)

    def __call__(self, images: Tensor, prompt: Sequence[str]) -> Tensor:
        """(N,) cosine."""
        return self.clip.cosine(images, prompt)
