"""The two embedded text-to-image checkpoints, pre-trained on pictures that the program draws.

A checkpoint folder holds model.safetensors and config.json,
whose "made_by" names the command, seed and time that made it and how good it is, whose "judged_by" what
`rlflow eval` judges it by.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlflow import registry
from rlflow.envs.captions import scenes, words
from rlflow.models.dit import DiT
from rlflow.models.io import save_field
from rlflow.models.pretrained.pipeline import PretrainedField
from rlflow.pretrain.matching import pretrain, report
from rlflow.rewards.shapes import shapes_strict

EVALUATION_STEPS = 10
ROWS = 64


@dataclass(frozen=True)
class World:
    """A captioned data source: `draw(rng)` gives one training (image (3, H, W) in [0, 1], caption)."""

    name: str
    vocab: list[str]
    draw: Callable[[np.random.Generator], tuple[NDArray[np.float32], str]]
    evaluate: Callable[[DiT], dict[str, float]]
    steps: int
    prompts: str
    metrics: dict[str, str]

    @property
    def asset(self) -> str:
        """Its folder."""
        return self.name

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Options of this kind of data: none."""

    @property
    def judged_by(self) -> dict[str, Any]:
        """Sections of a config that evaluate the checkpoint."""
        return {"env": {"prompts": self.prompts}, "eval": {"metrics": self.metrics}}

    def batches(self, field: DiT, rng: np.random.Generator, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (data (rows, 3, H, W) in [-1, 1], token ids (rows, context))."""
        while True:
            images, captions = zip(*(self.draw(rng) for _ in range(rows)), strict=True)
            yield torch.from_numpy(np.stack(images)) * 2 - 1, field.tokenize(captions)

    def make(self, out: Path, args: argparse.Namespace) -> dict[str, Any]:
        """Pre-train a DiT, judge it and save it in `out`; returns config.json's "made_by"."""
        for name in self.metrics.values():
            registry.find("reward", name)  # what cannot be judged here is said before it is trained
        torch.manual_seed(args.seed)
        field = DiT(self.vocab)
        begin, begin_cpu = time.perf_counter(), time.process_time()
        averaged = pretrain(
            field,
            self.batches(field, np.random.default_rng(args.seed), ROWS),
            steps=args.steps,
            hidden=field.hidden_matrices(),
            seed=args.seed,
            progress=report(args.steps),
        )
        made_by = {
            "command": f"python scripts/pretrain_{self.name}.py --steps {args.steps} --seed {args.seed}",
            "seed": args.seed,
            "steps": args.steps,
            "seconds": round(time.perf_counter() - begin),
            "cpu_seconds": round(time.process_time() - begin_cpu),
            "threads": torch.get_num_threads(),
        }
        made_by |= {name: round(value, 3) for name, value in self.evaluate(averaged).items()}
        made_by["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
        save_field(averaged, out, made_by, self.judged_by)
        return made_by


@torch.no_grad()
def euler_images(
    field: DiT | PretrainedField, captions: list[str], seed: int, *, num_steps: int = EVALUATION_STEPS
) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] for captions by uniform Euler steps, without guidance."""
    rng, place = torch.Generator().manual_seed(seed), next(field.parameters()).device
    images = []
    for part in (captions[i : i + 64] for i in range(0, len(captions), 64)):
        x = torch.randn((len(part), *field.event_shape), generator=rng).to(place)
        with torch.autocast(place.type, torch.bfloat16):
            cond = field.encode(field.tokenize(part).to(place))
            for k in range(num_steps):
                t = torch.full((len(part),), k / num_steps, device=place)
                x = x + field(x, t, torch.full_like(t, 1 / num_steps), cond) / num_steps
        images.append(field.decode(x).cpu())
    return torch.cat(images)


def draw_scene(rng: np.random.Generator) -> tuple[NDArray[np.float32], str]:
    """A drawing of a random training caption."""
    (text,) = scenes.draw_captions(rng, 1)
    return scenes.render(scenes.parse(text), rng), text


def judge_scenes(field: DiT | PretrainedField, num_steps: int = EVALUATION_STEPS) -> dict[str, float]:
    """Strict accuracy on two drawings of every held-out caption: of all, and of each kind."""
    captions = scenes.heldout_captions() * 2
    right = shapes_strict(euler_images(field, captions, seed=0, num_steps=num_steps), captions)
    kinds = [scenes.parse(text).kind for text in captions]
    share = {"heldout_strict": right.mean().item()}
    for kind in scenes.KINDS:
        share[f"heldout_strict_{kind}"] = right[torch.tensor([k == kind for k in kinds])].mean().item()
    return share


def draw_word(rng: np.random.Generator) -> tuple[NDArray[np.float32], str]:
    """A drawing of a random training string."""
    (text,) = words.draw_texts(rng, 1)
    return words.render(text, rng), words.caption(text)


def judge_words(field: DiT) -> dict[str, float]:
    """Share of 256 held-out strings that text recognition reads back exactly."""
    from rlflow.rewards.ocr import ocr_exact  # needs rapidocr, which shapes can be made without

    texts = words.draw_texts(np.random.default_rng(0), 256, heldout=True)
    images = euler_images(field, [words.caption(text) for text in texts], seed=0)
    return {"heldout_ocr": torch.as_tensor(ocr_exact(images, texts)).nanmean().item()}


SHAPES_METRICS = {"strict": "shapes_strict", "soft": "shapes_soft", "judge": "cnn_judge", "diversity": "diversity"}
WORDS_METRICS = {"strict": "ocr_exact", "soft": "ocr", "judge": "word_judge"}
IMAGES = {
    "shapes": World("shapes", scenes.VOCAB, draw_scene, judge_scenes, 750, "scenes", SHAPES_METRICS),
    "words": World("words", words.VOCAB, draw_word, judge_words, 500, "words", WORDS_METRICS),
}
