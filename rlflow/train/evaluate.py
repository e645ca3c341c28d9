"""Held-out evaluation with the deployment sampler: fixed prompts, fixed noise, exactly `num` samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlflow import dist
from rlflow.envs.prompts import Prompts
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import Solver
from rlflow.registry import located
from rlflow.rewards.base import RewardSet


@dataclass(frozen=True)
class Evaluation:
    """Scores per sample by metric name (N,), the images (N, 3, H, W), their captions and caption numbers (N,)."""

    scores: dict[str, Tensor]
    images: Tensor
    captions: list[str]
    caption_id: Tensor

    def means(self) -> dict[str, float]:
        """Mean over the samples that have a score."""
        return {n: float(s.nanmean()) for n, s in self.scores.items()}

    def save(self, path: Path) -> None:
        """Per-sample scores, for paired comparisons later."""
        save_file({**self.scores, "caption_id": self.caption_id}, path)


def evenly(prompts: Prompts, num: int) -> list[int]:
    """`num` rows spread over the whole table; each row as often as any other, give or take one."""
    n = len(prompts)
    if num >= n:
        return [i % n for i in range(num)]
    return torch.linspace(0, n - 1, num, dtype=torch.float64).round().long().tolist()


class Evaluator:
    """Samples and scores the same `num` prompts with the same noise each time it is called."""

    def __init__(
        self,
        policy: FlowPolicy,
        prompts: Prompts,
        judges: RewardSet,
        *,
        num: int = 500,
        num_steps: int | None = None,
        solver: Solver | None = None,
        seed: int = 0,
        rows_per_call: int = 100,
    ):
        judges.check_columns([*prompts.columns, "images", "group", "base_images"])
        if num < dist.world():
            raise ValueError(f"eval.num: {num} samples cannot be shared by {dist.world()} processes")
        with located("eval.num_steps"):
            policy.plan(num_steps)
        self.policy, self.prompts, self.judges = policy, prompts, judges
        self.num_steps, self.solver, self.seed = num_steps, solver, seed
        self.rows_per_call = rows_per_call
        self.columns: dict[str, Any] = prompts.take(evenly(prompts, num))
        captions: list[str] = self.columns["prompt"]
        known = {text: i for i, text in enumerate(dict.fromkeys(captions))}
        self.caption_id = torch.tensor([known[text] for text in captions])
        self.base_images: Tensor | None = None

    @torch.no_grad()
    def images(self, progress: Callable[[int], None] | None = None) -> Tensor:
        """(N, 3, H, W) in [0, 1] from the weights in place; every rank makes a share and gets all."""
        captions = self.columns["prompt"]
        ids = torch.arange(len(captions))
        mine = ids.tensor_split(dist.world())[dist.rank()]
        parts = []
        for rows in mine.split(self.rows_per_call):
            parts.append(self._batch([captions[i] for i in rows], rows))
            if progress is not None:
                progress(len(rows))
        return self._gather(torch.cat(parts), len(captions))

    def _batch(self, captions: list[str], rows: Tensor) -> Tensor:
        policy = self.policy
        trained_with, policy.solver = policy.solver, self.solver or policy.solver
        try:
            cond = policy.encode(policy.field.unguided.tokenize(captions))
            chain = policy.sample(cond, policy.plan(self.num_steps), key=Key(self.seed, "evaluate"), row_ids=rows)
        finally:
            policy.solver = trained_with
        return policy.field.decode(policy.squash(chain.final)).float().cpu()

    @staticmethod
    def _gather(mine: Tensor, total: int) -> Tensor:
        if dist.world() == 1:
            return mine
        most = -(-total // dist.world())
        padded = torch.cat([mine, mine.new_zeros((most - len(mine), *mine.shape[1:]))])
        sizes = [len(p) for p in torch.arange(total).tensor_split(dist.world())]
        everyone = dist.all_gather_rows(padded).split(most)
        return torch.cat([part[:n] for part, n in zip(everyone, sizes, strict=True)])

    def __call__(self, weights: str = "live") -> Evaluation:
        """Evaluate one weight set; the first call fixes the base images unless they were set."""
        with self.policy.using(weights):
            images = self.images()
        if self.base_images is None:
            self.base_images = images
        columns = self.columns | {"images": images, "group": self.caption_id, "base_images": self.base_images}
        return Evaluation(self.judges.compute(columns, len(images)), images, self.columns["prompt"], self.caption_id)


def load_scores(path: Path) -> dict[str, Tensor]:
    """What `Evaluation.save` wrote."""
    return load_file(path)
