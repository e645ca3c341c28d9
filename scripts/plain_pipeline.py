"""A LoRA that rlflow saved, in plain diffusers: strict accuracy on held-out captions with and without it, as JSON.

    python scripts/plain_pipeline.py sd3_scenes runs/sd3/model  # or klein_scenes, sd15_scenes

Pictures come from the folder's pipeline and its own sampler; of rlflow only the captions and the verifier are used.
"""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rlflow.envs.captions import scenes
from rlflow.pretrain.scene_pipelines import LENGTH, SIDE
from rlflow.rewards.shapes import shapes_strict


def accuracy(pipe: Any, captions: list[str], num_steps: int, seed: int) -> float:
    """Share of the captions whose picture the verifier reads as asked."""
    pictures, short = [], {}
    if "max_sequence_length" in inspect.signature(pipe.__call__).parameters:  # not of Stable Diffusion 1.5
        short = {"max_sequence_length": LENGTH}
    for start in range(0, len(captions), 64):
        pictures += pipe(
            prompt=captions[start : start + 64],
            height=SIDE,
            width=SIDE,
            guidance_scale=1.0,
            num_inference_steps=num_steps,
            generator=torch.Generator().manual_seed(seed + start),
            output_type="pt",
            **short,
        ).images.cpu()
    return shapes_strict(torch.stack(pictures), captions).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder of the pipeline")
    parser.add_argument("lora", help="folder of the LoRA")
    parser.add_argument("--num", type=int, default=284, help="pictures")
    parser.add_argument("--num-steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = DiffusionPipeline.from_pretrained(args.base)
    pipe.set_progress_bar_config(disable=True)
    captions = scenes.heldout_captions()[: args.num]
    out = {"pictures": len(captions), "num_steps": args.num_steps}
    out["strict_without"] = accuracy(pipe, captions, args.num_steps, args.seed)
    pipe.load_lora_weights(args.lora)
    out["strict_with"] = accuracy(pipe, captions, args.num_steps, args.seed)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
