"""Train the CNN judge (rewards/judges.py) on true renders of training captions and of other scenes.

    python scripts/train_judge.py --out rlflow/assets/judge        # about 4 CPU minutes on one thread

Images are spoilt on purpose (noise, blur, colour, background, small warps, specks) so that the judge says
something about generated images, not only about true renders. Held-out captions are never drawn. The judge of
words (train_word_judge.py) is another `Lesson`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from rlflow.envs.captions.scenes import COLORS, RELATIONS, Scene, draw_captions, parse, render
from rlflow.rewards.judges import THINGS, SceneCNN, thing_counts, verdicts

NAMES = list(COLORS)


@dataclass(frozen=True)
class Lesson:
    """What a judge learns from and is measured by; a target is what one image shows."""

    name: str  # of the network, in config.json
    script: str
    make: Callable[[int], nn.Module]  # of a width
    draw: Callable[[np.random.Generator, int], tuple[Tensor, list[Any]]]  # training images and targets
    render: Callable[[np.random.Generator, int, bool], tuple[Tensor, list[Any]]]  # true renders, held-out or not
    loss: Callable[[Any, Tensor, list[Any]], Tensor]
    right: Callable[[Any, Tensor, list[Any]], Tensor]  # (N,) bool: the image shows the target
    steps: int


def draw_scene(rng: np.random.Generator) -> Scene:
    """A training caption's scene (70 %), an empty one (4 %), or 3 to 4 things, which no caption says."""
    if rng.random() < 0.7:
        return parse(draw_captions(rng, 1)[0])
    number = rng.choice((0, 3, 4), p=(0.14, 0.43, 0.43))
    things = [THINGS[i] for i in rng.integers(len(THINGS), size=number)]
    if len(set(things)) == 1:  # a count scene, possibly a held-out one
        things[0] = THINGS[THINGS.index(things[0]) - 1]
    return Scene(tuple(things))


def draw_batch(rng: np.random.Generator, number: int) -> tuple[Tensor, list[Scene]]:
    """True renders (N, 3, 32, 32) and their scenes."""
    scenes = [draw_scene(rng) for _ in range(number)]
    blank = np.zeros((3, 32, 32), np.float32)
    return torch.from_numpy(np.stack([render(s, rng) if s.things else blank for s in scenes])), scenes


def spoil(images: Tensor, g: torch.Generator) -> Tensor:
    """Random colour, background, warp, specks, blur, patch texture, noise, of random strength per image."""
    n, _, h, w = images.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=g)

    def smooth(cells: int, channels: int, mode: str = "bicubic") -> Tensor:
        coarse = torch.randn((n, channels, cells, cells), generator=g)
        return F.interpolate(coarse, (h, w), mode=mode)

    images = images * uniform(0.85, 1.1, n, 1, 1, 1) * uniform(0.92, 1.08, n, 3, 1, 1)
    axis = torch.linspace(-1, 1, w) * (1 - 1 / w)
    grid = torch.stack([axis.expand(h, w), axis[:, None].expand(h, w)], -1)
    shift = smooth(5, 2).permute(0, 2, 3, 1) * uniform(0, 0.025, n, 1, 1, 1)  # one sigma: up to .4 pixels
    images = F.grid_sample(images, grid + shift, align_corners=False, padding_mode="border")
    images = images + smooth(4, 3).abs() * uniform(0, 0.06, n, 1, 1, 1)
    speck = (torch.rand((n, 1, h, w), generator=g) < uniform(0, 0.006, n, 1, 1, 1)).float()
    images = torch.lerp(images, torch.rand((n, 3, 1, 1), generator=g).expand_as(images), speck)
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    blurred = F.conv2d(images.flatten(0, 1)[:, None], (kernel[:, None] * kernel)[None, None], padding=1)
    images = torch.lerp(images, blurred.view_as(images), uniform(0, 1, n, 1, 1, 1))
    images = images + smooth(8, 3, "nearest") * uniform(0, 0.04, n, 1, 1, 1)
    images = images + torch.randn(images.shape, generator=g) * uniform(0, 0.09, n, 1, 1, 1)
    return images.clamp(0, 1)


def loss_of(model: SceneCNN, images: Tensor, scenes: list[Scene]) -> Tensor:
    """Huber loss of the counts plus cross-entropy of the relations."""
    counts, places = model(images)
    wanted = torch.stack([thing_counts(s) for s in scenes])
    loss = F.smooth_l1_loss(counts, wanted, beta=0.2, reduction="none").sum(1).mean()
    related = [i for i, s in enumerate(scenes) if s.relation is not None]
    first, second = (torch.tensor([NAMES.index(scenes[i].things[k].color) for i in related]) for k in (0, 1))
    target = torch.tensor([RELATIONS.index(scenes[i].relation or "") for i in related])
    return loss + 0.5 * F.cross_entropy(model.relation_logits(places[related], first, second), target)


def render_scenes(rng: np.random.Generator, number: int, heldout: bool) -> tuple[Tensor, list[Scene]]:
    """True renders of captions of one side of the split."""
    scenes = [parse(c) for c in draw_captions(rng, number, heldout=heldout)]
    return torch.from_numpy(np.stack([render(s, rng) for s in scenes])), scenes


def right_scenes(model: SceneCNN, images: Tensor, scenes: list[Scene]) -> Tensor:
    """(N,) bool: the judge sees the scene in the image."""
    return verdicts(model, *model(images), scenes)


SHAPES = Lesson("scene_cnn", "train_judge.py", SceneCNN, draw_batch, render_scenes, loss_of, right_scenes, steps=1500)


# -- any judge ------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(
    lesson: Lesson, model: nn.Module, rng: np.random.Generator, heldout: bool, spoilt: bool, number: int = 2000
) -> dict[str, float]:
    """Share of verdicts "right" for the true targets and for those of other rows."""
    images, targets = lesson.render(rng, number, heldout)
    if spoilt:
        images = spoil(images, torch.Generator().manual_seed(int(rng.integers(2**31))))
    model.eval()
    shuffled = [targets[i] for i in rng.permutation(number)]
    asked = {"true": targets, "shuffled": shuffled}
    share = {name: round(lesson.right(model, images, t).float().mean().item(), 4) for name, t in asked.items()}
    model.train()
    return share


def train(lesson: Lesson, steps: int, batch: int, lr: float, width: int, seed: int) -> nn.Module:
    """AdamW with warm-up and cosine; prints the loss and the accuracy as it goes."""
    torch.manual_seed(seed)
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    model = lesson.make(width).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        images, targets = lesson.draw(rng, batch)
        strength = min(1.0, step / (0.4 * steps))  # clean images first: spoilt from the start it learns 5x slower
        loss = lesson.loss(model, torch.lerp(images, spoil(images, g), strength), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            spoilt = accuracy(lesson, model, np.random.default_rng(1), heldout=False, spoilt=True, number=500)
            print(f"step {step} loss {loss.item():.4f} spoilt {spoilt['true']:.3f}", flush=True)
    return model.eval()


def main(lesson: Lesson = SHAPES) -> None:
    """Train, measure, write model.safetensors and config.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=lesson.steps)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    model = train(lesson, args.steps, args.batch, args.lr, args.width, args.seed)
    seconds = time.process_time() - start
    measured = {
        f"{'heldout' if heldout else 'train'}{'_spoilt' if spoilt else ''}": accuracy(
            lesson, model, np.random.default_rng(7), heldout, spoilt
        )
        for heldout in (False, True)
        for spoilt in (False, True)
    }
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.out / "model.safetensors")
    command = f"python scripts/{lesson.script} --out {args.out} --steps {args.steps} --batch {args.batch}"
    command += f" --lr {args.lr} --width {args.width} --seed {args.seed}"
    made_by = {"command": command, "seed": args.seed, "cpu_seconds": round(seconds), "accuracy": measured}
    config = {"model": lesson.name, "args": {"width": args.width}, "made_by": made_by}
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(json.dumps(made_by, indent=2), f"{sum(p.numel() for p in model.parameters())} parameters")


if __name__ == "__main__":
    main()
