"""PromptEnv: image or video generation as an environment with horizon T = 1; prompt = observation, latent = action.

`send` decodes a micro-batch and hands it to the rewards in another thread, so the next one is sampled
meanwhile; `recv` joins them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from rlflow.envs.base import VecEnv, reward_metrics
from rlflow.envs.contract import BadRows, finite_rows, keep_rows
from rlflow.envs.prompts import Prompts
from rlflow.parallel import dist
from rlflow.rewards.base import RewardSet
from rlflow.rewards.frames import OF_VIDEOS, made_column, made_columns
from rlflow.types import Step, Tree


class PromptEnv(VecEnv):
    """Prompts in, rewards out. Groups with the same serial number get the same prompt."""

    horizon = 1

    def __init__(
        self,
        prompts: Prompts,
        rewards: RewardSet,
        num_envs: int,
        action_shape: Sequence[int],
        tokenize: Callable[[list[str]], Tree],
        decode: Callable[[Tensor], Tensor],
        seed: int = 0,
        videos: bool = False,
    ):
        _check_columns(prompts, rewards, made_column(videos))
        self.prompts, self.rewards, self.num_envs, self.seed = prompts, rewards, num_envs, seed
        self.action_shape, self.tokenize, self.decode = tuple(action_shape), tokenize, decode
        self.rows: list[int] = []
        self.serial = torch.zeros(0, dtype=torch.long)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rewards")
        self._sent: list[tuple[slice, Future[dict[str, Tensor]]]] = []
        self._bad, self._finite = BadRows("env prompt", self.device), torch.ones(num_envs, dtype=torch.bool)

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        """The prompts of serial numbers `seeds`, tokenised."""
        if mask is not None and not bool(mask.all()):
            raise ValueError("a prompt is a whole episode: PromptEnv resets all rows at once")
        self.serial = seeds.cpu()
        self.rows = self.prompts.index(seeds.tolist(), self.seed)
        self.obs = self.tokenize(self.prompts.take(self.rows)["prompt"])
        return self.obs

    def send(self, action: Tensor, rows: slice) -> None:
        """Decode and score `rows` in the background: whole groups, since a reward may compare a group's images."""
        good = finite_rows(action)
        images = self.decode(keep_rows(good, action.detach())).float().cpu()
        self._finite[rows] = good.cpu()
        columns: dict[str, Any] = self.prompts.take(self.rows[rows])
        columns |= made_columns(images) | {"group": self.serial[rows]}
        self._sent.append((rows, self._pool.submit(self.rewards.compute, columns, len(images))))

    def recv(self) -> Step:
        """Join all scores; a row without one has reward nan, and like one of a broken latent it is not valid."""
        parts = {n: torch.full((self.num_envs,), torch.nan) for n in self.rewards.weights}
        sent, self._sent = self._sent, []
        for rows, future in sent:
            for name, score in future.result().items():
                parts[name][rows] = score
        everyone = {n: dist.all_gather_rows(v) for n, v in parts.items()}
        reward, valid = self.rewards.total(parts, everyone)
        self._bad.add(~self._finite)
        done = torch.ones(self.num_envs, dtype=torch.bool)
        return Step(self.obs, reward, done, ~done, None, valid & self._finite, {}, parts)

    def graded(self, action: Tensor, rows: Tensor) -> Tensor:
        """Rewards (M,) of samples (M, *D) for the prompts in hand of `rows` (M,), with a graph through the decoder."""
        picked = rows.tolist()
        columns: dict[str, Any] = self.prompts.take([self.rows[i] for i in picked])
        columns |= made_columns(self.decode(action).float()) | {"group": self.serial[picked]}
        return self.rewards.graded(columns, len(picked))

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weights when rewards combine as advantages."""
        return self.rewards.weights if self.rewards.normalize == "advantage" else {}

    def metrics(self) -> dict[str, float]:
        """Per-reward means, masked shares, seconds and failed calls since the last call; latents left out."""
        return reward_metrics(self.rewards) | self._bad.metrics()


def _check_columns(prompts: Prompts, rewards: RewardSet, made: str) -> None:
    """ValueError where a reward reads what training does not have, or a prompt column takes a name of ours."""
    if taken := sorted({"group", *OF_VIDEOS, *OF_VIDEOS.values()} & set(prompts.columns)):
        raise ValueError(f"prompt columns {taken} would hide what is given to rewards under these names: rename them")
    for r in rewards.rewards:
        if {"base_images", "base_frames"} & set(r.columns):
            raise ValueError(
                f"reward {r.name!r} compares with the un-tuned policy's images, which only evaluation makes: "
                "take it out of reward.weights and name it in eval.metrics"
            )
    rewards.check_columns([*prompts.columns, made, "group"])
