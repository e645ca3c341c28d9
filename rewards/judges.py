"""Held-out judges: what no reward sees, logged beside the reward so that reward hacking shows.

`cnn_judge` is a small network trained on true renders (scripts/train_judge.py) that shares nothing with the
verifier of shapes.py but the captions. For every one of the 18 things (colour, shape) it predicts a density
over an 8 x 8 map whose sum is how many there are, and for every colour a map of where it is, from which a
learned layer tells the relation. `second_judge` is the same from another seed: it watches runs whose reward is the
first. `diversity` and `base_distance` are root-mean-square differences of pixel
values in [0, 1].
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

import rlflow
from rlflow.envs.captions.scenes import COLORS, RELATIONS, SHAPES, Scene, Thing, parse
from rlflow.rewards.component import differentiable
from rlflow.rewards.memory import BatchMemory

M = TypeVar("M", bound=nn.Module)

SIZE = 32
THINGS = tuple(Thing(color, shape) for color in COLORS for shape in SHAPES)
ASSETS = Path(rlflow.__file__).parent / "assets"


def block(inputs: int, outputs: int, kernel: int, stride: int) -> tuple[nn.Module, ...]:
    """Convolution, batch norm, SiLU."""
    # batch norm, not group norm: normalising every image by itself divides out how much is in it
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.BatchNorm2d(outputs), nn.SiLU()


class SceneCNN(nn.Module):
    """Counts of the 18 things and, for any two colours, the relation of the first to the second."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        wide = 3 * width
        self.trunk = nn.Sequential(
            *block(3, width, 5, 2),
            *block(width, 2 * width, 3, 1),
            *block(2 * width, wide, 3, 2),
            *block(wide, wide, 3, 1),
        )
        self.density = nn.Conv2d(wide, len(THINGS), 1)
        self.where = nn.Conv2d(wide, len(COLORS), 1)
        self.relation = nn.Linear(2, len(RELATIONS))
        self.density.bias = nn.Parameter(torch.full((len(THINGS),), -0.5))  # starts near "nothing there"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, 32, 32) in [0, 1] to counts (N, 18) and places (N, 6, 2), x and y in [-1, 1]."""
        h = self.trunk(2 * images - 1)
        counts = F.softplus(self.density(h), beta=4).sum((2, 3))
        share = self.where(h).flatten(2).softmax(-1)
        axis = torch.linspace(-1, 1, h.shape[-1], device=h.device)
        grid = torch.stack([axis.repeat(len(axis)), axis.repeat_interleave(len(axis))], -1)
        return counts, share @ grid

    def relation_logits(self, places: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """(N, 4) logits over RELATIONS of colour `first` (N,) to colour `second` (N,)."""
        rows = torch.arange(len(places), device=places.device)
        return self.relation(places[rows, second] - places[rows, first])


def thing_counts(scene: Scene) -> Tensor:
    """(18,) how many of every thing the scene holds."""
    counts = torch.zeros(len(THINGS))
    for thing in scene.objects:
        counts[THINGS.index(thing)] += 1
    return counts


def load_network(make: Callable[..., M], folder: Path) -> M:
    """A judge's network as trained, in evaluation mode."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = make(**config["args"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().requires_grad_(False)


@functools.cache
def load_judge(name: str = "judge") -> SceneCNN:
    """A network that ships with the package, `judge` or `second_judge`, in evaluation mode."""
    return load_network(SceneCNN, ASSETS / name)


def small_images(pixels: NDArray[np.uint8]) -> tuple[Tensor, ...]:
    """8-bit pixels (N, H, W, 3) to batches (<= 256, 3, 32, 32) in [0, 1], as the judges' networks read them."""
    return _small(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).split(256)


def _small(images: Tensor) -> Tensor:
    """(N, 3, H, W) to (N, 3, 32, 32)."""
    return images if images.shape[-2:] == (SIZE, SIZE) else F.interpolate(images, (SIZE, SIZE), mode="area")


@torch.no_grad()
def _look(name: str, pixels: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    parts = [load_judge(name)(part) for part in small_images(pixels)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


memory, second_memory = (BatchMemory(functools.partial(_look, name)) for name in ("judge", "second_judge"))


def verdicts(model: SceneCNN, counts: Tensor, places: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """(N,) bool: all 18 counts round to the scene's and the likeliest relation is the scene's."""
    wanted = torch.stack([thing_counts(scene) for scene in scenes])
    right = ((counts - wanted).abs() < 0.5).all(1)
    related, logits, target = _relations(model, places, scenes)
    right[related] &= logits.argmax(1) == target
    return right


def _relations(model: SceneCNN, places: Tensor, scenes: Sequence[Scene]) -> tuple[list[int], Tensor, Tensor]:
    """Rows (M) whose scene has a relation, the network's logits (M, 4) for it, and which it is (M,)."""
    names = list(COLORS)
    related = [i for i, scene in enumerate(scenes) if scene.relation is not None]
    first, second = (
        torch.tensor([names.index(scenes[i].things[k].color) for i in related], dtype=torch.long) for k in (0, 1)
    )
    target = torch.tensor([RELATIONS.index(scenes[i].relation or "") for i in related], dtype=torch.long)
    return related, model.relation_logits(places[related], first, second), target


def cnn_judge(images: Tensor, prompt: Sequence[str]) -> Tensor:
    """(N,) 1 where the network sees exactly what the caption says, else 0; ValueError for a foreign caption."""
    return verdicts(load_judge(), *memory(images), [parse(caption) for caption in prompt]).float()


def second_judge(images: Tensor, prompt: Sequence[str]) -> Tensor:
    """(N,) as `cnn_judge`, by the second network."""
    return verdicts(load_judge("second_judge"), *second_memory(images), [parse(caption) for caption in prompt]).float()


@differentiable
def cnn_judge_soft(images: Tensor, prompt: Sequence[str]) -> Tensor:
    """(N,) <= 0: less the errors of the 18 counts, plus the log-probability of the relation; 0 is certainly right.

    Of the images as they are, not rounded to 8 bits: a reward that gives gradients.
    """
    return _soft(load_judge(), images, prompt)


@differentiable
def second_judge_soft(images: Tensor, prompt: Sequence[str]) -> Tensor:
    """(N,) as `cnn_judge_soft`, by the second network: together they are harder to fool than one."""
    return _soft(load_judge("second_judge"), images, prompt)


def _soft(judge: SceneCNN, images: Tensor, prompt: Sequence[str]) -> Tensor:
    scenes = [parse(caption) for caption in prompt]
    counts, places = judge(_small(images.float().cpu()))
    wanted = torch.stack([thing_counts(scene) for scene in scenes])
    scores = -F.smooth_l1_loss(counts, wanted, reduction="none").sum(1)
    related, logits, target = _relations(judge, places, scenes)
    chances = logits.log_softmax(1)[torch.arange(len(target)), target]
    return scores.index_add(0, torch.tensor(related, dtype=torch.long), chances).to(images.device)


def diversity(images: Tensor, group: Tensor) -> Tensor:
    """(N,) mean RMS pixel distance to the others of the row's group, in [0, 1]; nan for a group of one.

    The mean over the rows of a group is its mean pairwise distance.
    """
    flat = images.detach().float().flatten(1)
    out = torch.full((len(flat),), torch.nan)
    for g in group.unique():
        rows = (group == g).nonzero().flatten()
        if len(rows) > 1:
            distance = torch.cdist(flat[rows], flat[rows], compute_mode="donot_use_mm_for_euclid_dist")
            out[rows.cpu()] = (distance.sum(1) / (len(rows) - 1) / flat.shape[1] ** 0.5).cpu()
    return out


def base_distance(images: Tensor, base_images: Tensor) -> Tensor:
    """(N,) RMS pixel distance in [0, 1] to the un-tuned model's sample from the same noise."""
    return (images.float() - base_images.float()).square().mean((1, 2, 3)).sqrt()
