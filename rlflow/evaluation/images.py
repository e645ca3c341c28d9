"""Held-out evaluation with the deployment sampler: fixed prompts, fixed noise, exactly `num` samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlflow.envs.prompts import Prompts
from rlflow.files import save_tensors
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.select import Select
from rlflow.flow.solvers import Solver
from rlflow.parallel import dist
from rlflow.registry import located
from rlflow.report.pairing import kept, sample_keys
from rlflow.rewards.base import RewardSet
from rlflow.rewards.frames import made_column, made_columns


@dataclass(frozen=True)
class Evaluation:
    """Scores per sample by metric name (N,), the images (N, 3, H, W), their captions, caption numbers and keys (N,).

    Where the model makes videos, `images` are (N, F, 3, H, W).
    """

    scores: dict[str, Tensor]
    images: Tensor
    captions: list[str]
    caption_id: Tensor
    key: Tensor | None = None  # (N,) of what each sample was asked
    calls: float | None = None  # network rows of a sample, where it was made by a policy

    def means(self) -> dict[str, float]:
        """Mean over the samples that have a score; "calls" over all of them."""
        told = {} if self.calls is None else {"calls": self.calls}
        return {n: float(s.nanmean()) for n, s in self.scores.items()} | told

    def by_task(self) -> dict[str, float]:
        """Of simulators."""
        return {}

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def about(self) -> str:
        """What was evaluated, in words."""
        return f"{len(self)} samples of {len(set(self.captions))} held-out prompts"

    def save(self, path: Path) -> None:
        """Per-sample scores, for paired comparisons later."""
        save_tensors(kept(self.scores, self.caption_id, self.key), path)

    def show(self, folder: Path, iteration: int, num: int) -> dict[str, Path]:
        """Write `num` of the images, spread over the prompts, as tensors and as a captioned picture: {name: path}.

        Of videos, strips of some of their frames in place of images, and films of the first.
        """
        from rlflow.report.figures import image_grid
        from rlflow.report.video import films, strips

        some = torch.linspace(0, len(self) - 1, min(num, len(self))).long()
        grid = folder / f"eval_{iteration:06d}.png"
        shown, filmed = self.images[some], {}
        if shown.ndim == 5:
            filmed = {f"eval/film_{i}": path for i, path in enumerate(films(shown, folder, iteration))}
            shown = strips(shown)
        image_grid(shown, [self.captions[i] for i in some], grid)
        images = {"images": (shown * 255).round().to(torch.uint8), "index": some}
        save_tensors(images, folder / f"images_{iteration:06d}.safetensors")
        return {"eval/pictures": grid, **filmed}


@contextmanager
def deployed(policy: FlowPolicy, solver: Solver | None, resolution: int | None = None) -> Iterator[None]:
    """With `solver` and `resolution` in place of those the policy trains with, if there are others."""
    trained_with, policy.solver = policy.solver, solver or policy.solver
    field, trained_at = policy.field.unguided, policy.field.unguided.resolution
    if resolution is not None:
        field.resize(resolution)
    try:
        yield
    finally:
        policy.solver = trained_with
        if trained_at is not None:
            field.resize(trained_at)


class Calls:
    """Network rows that a policy takes for one row, by the rows that were made while it was counted."""

    def __init__(self, policy: FlowPolicy):
        self.policy, self._told = policy, torch.zeros(2, dtype=torch.float64)

    @contextmanager
    def count(self, num: int) -> Iterator[None]:
        """What happens inside makes `num` rows."""
        before = self.policy.network_rows
        yield
        self._told += torch.tensor([self.policy.network_rows - before, num])

    def begin(self) -> None:
        """Forget what was counted."""
        self._told.zero_()

    def mean(self) -> float:
        """Of all ranks, since the beginning."""
        rows, made = dist.all_sum(self._told.to(dist.device()))
        return float(rows / made)


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
        resolution: int | None = None,
        select: Select | None = None,
    ):
        made = made_column(policy.field.frames is not None)
        judges.check_columns([*prompts.columns, made, "group", f"base_{made}"])
        with located("eval.resolution"), deployed(policy, solver, resolution):
            pass
        with located("eval.num_steps"), deployed(policy, solver, resolution):
            policy.plan(num_steps)
        with located("eval.solver"):
            policy.check_solver(solver or policy.solver)
        self.policy, self.prompts, self.judges = policy, prompts, judges
        self.num_steps, self.solver, self.seed = num_steps, solver, seed
        self.rows_per_call, self.resolution, self.select = rows_per_call, resolution, select or Select()
        self._compares = f"base_{made}" in judges.columns
        self.columns: dict[str, Any] = prompts.take(evenly(prompts, num))
        captions: list[str] = self.columns["prompt"]
        known = {text: i for i, text in enumerate(dict.fromkeys(captions))}
        self.caption_id = torch.tensor([known[text] for text in captions])
        asked = zip(*self.columns.values(), strict=True)
        rows = ([dict(zip(prompts.columns, row, strict=True)), seed, i] for i, row in enumerate(asked))
        self.key = torch.from_numpy(sample_keys(rows))
        self.base_images: Tensor | None = None
        self._calls = Calls(policy)

    @torch.no_grad()
    def images(self, progress: Callable[[int], None] | None = None) -> Tensor:
        """(N, 3, H, W) or (N, F, 3, H, W) in [0, 1] of the weights in place; every rank makes a share and gets all."""
        ids = torch.arange(len(self.caption_id))
        mine = ids.tensor_split(dist.world())[dist.rank()]
        equal = torch.cat([mine, mine[-1:]])[: -(-len(ids) // dist.world())]  # a sharded network is called by all
        parts = []
        for rows in equal.split(max(1, self.rows_per_call // self.select.num)):
            parts.append(self._batch(rows))
            if progress is not None:
                progress(len(rows))
        return dist.gather_shares(torch.cat(parts)[: len(mine)], len(ids))

    def _batch(self, rows: Tensor) -> Tensor:
        policy, asked = self.policy, {name: [values[i] for i in rows] for name, values in self.columns.items()}
        with deployed(policy, self.solver, self.resolution), self._calls.count(len(rows)):
            cond = policy.encode(policy.field.unguided.tokenize(asked["prompt"]))
            plan, key = policy.plan(self.num_steps), Key(self.seed, "evaluate")
            return self.select(policy, cond, asked, plan, key, rows).float().cpu()

    def __call__(self, weights: str = "live") -> Evaluation:
        """Evaluate one weight set; the first call fixes the base images unless they were set."""
        self._calls.begin()
        with self.policy.using(weights):
            images = self.images()
        calls = self._calls.mean()
        if self.base_images is None and self._compares:
            self.base_images = images
        columns = self.columns | made_columns(images, self.base_images) | {"group": self.caption_id}
        scores = self.judges.compute(columns, len(images))
        return Evaluation(scores, images, self.columns["prompt"], self.caption_id, self.key, calls)

    def compare_with(self, policy: FlowPolicy) -> None:
        """Take the base images, to measure the distance from, of another policy; nothing where no judge does."""
        if not self._compares:
            return
        mine, self.policy = self.policy, policy
        try:
            self.base_images = self.images()
        finally:
            self.policy = mine

    def state_dict(self) -> dict[str, Tensor]:
        """The base images; {} before they are made."""
        return {} if self.base_images is None else {"base_images": self.base_images}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.base_images = state.get("base_images")
