"""Fine-tune a diffusers folder of your own (Stable Diffusion 3, FLUX, Z-Image, Qwen-Image) with a reward of your own.

    python docs/examples/own_pipeline.py FOLDER RUN [key=value ...]

FOLDER is what diffusers' `save_pretrained` wrote; where it does not exist, a tiny random one is made to try this out.
Any setting follows as key=value: policy.field.resolution=512 env.num_groups=8 train.iterations=200
"""

import sys
from pathlib import Path

from torch import Tensor

import rlflow as rf
from rlflow.models.pretrained.tiny import make_tiny

PROMPTS = [f"{what} {where}" for what in ("a red car", "a blue car", "two cats") for where in ("at night", "in snow")]
PROMPTS += ["a bowl of lemons", "a harbour", "a red door", "a lighthouse"]  # a fifth is held out for evaluation


def warmth(images: Tensor, prompt: list[str]) -> Tensor:
    """(N,) how much redder than blue each picture is, in [-1, 1].

    A reward names the columns it reads: `images` (N, 3, H, W) in [0, 1] and any column of the prompt file.
    """
    score = (images[:, 0] - images[:, 2]).mean(dim=(1, 2))
    for i, text in enumerate(prompt):
        if "blue" in text:  # no score, which is not a zero: the picture takes no part in the update
            score[i] = float("nan")
    return score


def main(folder: str, run: str, *more: str) -> None:
    """A few iterations of Flow-GRPO-Fast on a LoRA, then pictures before and after from the same noise."""
    if not Path(folder).exists():
        make_tiny("sd3", folder)
    prompts = Path(folder) / "my_prompts.txt"  # one a line; a .jsonl or .csv may have columns for your reward
    prompts.write_text("\n".join(PROMPTS) + "\n")
    settings = [
        *(f"policy.field.checkpoint={folder}", "policy.field.resolution=32", "policy.field.lora=8"),
        *("policy.field.max_sequence_length=32", "policy.field.weights=float32", "policy.precision=float32"),
        *(f"env.prompts={prompts}", "env.num_groups=2", "env.group_size=4"),  # 4 pictures of each of 2 prompts
        "reward.weights={'own_pipeline:warmth': 1.0}",  # file:function, so trust_code below
        "eval.metrics={warmth: 'own_pipeline:warmth'}",
        *("eval.num=12", "eval.num_steps=10", "train.iterations=10"),
    ]
    trainer = rf.Trainer("sd35_24gb", run, overrides=[*settings, *more], trust_code=True)
    before = rf.sample(trainer.policy, PROMPTS, seed=1)
    print("held out:", trainer.fit())
    after = rf.sample(trainer.policy, PROMPTS, seed=1)
    print(f"warmth {warmth(before, PROMPTS).nanmean():.4f} before, {warmth(after, PROMPTS).nanmean():.4f} after")
    print(f"{run}/model is a LoRA folder that plain diffusers loads; {run}/report.html shows the run")


if __name__ == "__main__":
    main(*sys.argv[1:])
