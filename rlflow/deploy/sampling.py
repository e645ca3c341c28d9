"""Pictures of a policy by its deployment sampler, and films of a robot's run or checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlflow.deploy.runs import Asked, evaluator_of
from rlflow.evaluation.episodes import EpisodeEvaluator, Episodes
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.report.video import write_video


def sample(policy: FlowPolicy, prompts: str | Sequence[str], *, seed: int = 0, num_steps: int | None = None) -> Tensor:
    """Images (N, 3, H, W), or videos (N, F, 3, H, W), in [0, 1] of a prompt or a list of N.

    By the deployment sampler: there is no noise after the first.

    Of a policy loaded with `select`, the chosen ones, by a reward that reads images and prompts alone.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not (isinstance(texts, Sequence) and texts and all(isinstance(text, str) for text in texts)):
        raise ValueError(f"prompts: give a text, or a list of texts, got {prompts!r}")
    with torch.no_grad():
        cond = policy.encode(policy.field.unguided.tokenize(list(texts)))
        plan, ids = policy.plan(num_steps), torch.arange(len(texts))
        return policy.select(policy, cond, {"prompt": list(texts)}, plan, Key(seed, "sample"), ids).float().cpu()


def film(name: str | Path, out: str | Path, asked: Asked) -> Episodes:
    """Play episodes of a robot's run or checkpoint and write them to `out`, an mp4, one after the other."""
    if Path(out).suffix != ".mp4":
        raise ValueError(f"{out}: {name} is filmed, name a file that ends in .mp4")
    evaluator = evaluator_of(name, asked)
    assert isinstance(evaluator, EpisodeEvaluator)
    evaluator.video = evaluator.num
    episodes = evaluator()
    frames = list(itertools.chain(*episodes.film.frames))
    if not frames:
        raise ValueError(f"{out} was not written: there is no picture of the {len(episodes)} episodes, see above")
    write_video(frames, Path(out), episodes.film.fps)
    return episodes
