"""Targeted: an environment that shows the return still to be earned, for policies that are told one.

target = first - earned so far in the episode (undiscounted, the environment's own rewards), so it is `first` again in
the next one. A policy cloned with targets is asked for a return by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlflow.envs.base import VecEnv
from rlflow.envs.wrappers import Wrapper
from rlflow.registry import SettingError
from rlflow.types import Step, Tree


class Targeted(Wrapper):
    """Observations {"obs": ...} or those of a dictionary, and "target" (B, 1); a row's first one goes by its seed.

    Rows of equal seeds are asked the same, and seeds in a row are asked the targets in turn.
    """

    def __init__(self, env: VecEnv, targets: Sequence[float]):
        if not targets:
            raise SettingError("targets", "name at least one return")
        if env.tasks:
            raise SettingError("targets", f"rows are asked different tasks already, {list(env.tasks)[:3]}")
        super().__init__(env)
        self.targets: Sequence[float] = list(targets)
        self.tasks = [f"return {target:g}" for target in targets] if len(targets) > 1 else ()
        self.first = torch.tensor(self.targets, device=env.device, dtype=torch.float32)
        self.chosen = torch.zeros(env.num_envs, dtype=torch.long, device=env.device)
        self.obs_spec = self._beside(env.obs_spec, torch.empty(1, device="meta"))
        _ = env.earned  # says where the environment keeps no books

    @property
    def asked(self) -> Tensor:
        """(B,) number of each row's target."""
        return self.chosen

    @staticmethod
    def _beside(obs: Tree, target: Tensor) -> Tree:
        seen = obs if isinstance(obs, dict) else {"obs": obs}
        return {**seen, "target": target}

    def _show(self, obs: Tree, earned: Tensor) -> Tree:
        left = self.first[self.chosen] - earned.nan_to_num().to(self.first)
        return self._beside(obs, left.unsqueeze(1))

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        """First observations with first targets in the rows of `mask`; the other rows show what is left to them."""
        obs, chosen = self.env.reset(seeds, mask), seeds.to(self.device) % len(self.targets)
        self.chosen = chosen if mask is None else torch.where(mask.to(self.device), chosen, self.chosen)
        return self._show(obs, self.env.earned)

    def recv(self) -> Step:
        """The step; what an ended row reached shows what it fell short by, its next episode the first target."""
        step = self.env.recv()
        earned = self.env.earned
        if step.final_obs is None:
            return replace(step, obs=self._show(step.obs, earned))
        whole = torch.where(step.ended, step.info["episode_return"].to(earned), earned)
        return replace(step, obs=self._show(step.obs, earned), final_obs=self._show(step.final_obs, whole))

    def own_state(self) -> dict[str, Tensor]:
        return {"chosen": self.chosen}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        self.chosen = state["chosen"]


def rank_correlation(asked: Tensor, achieved: Tensor) -> float:
    """Spearman's, of two rows of numbers (N,) without ties in the first; 0 where the second does not differ."""
    ranks = torch.stack([v.double().argsort().argsort().double() for v in (asked, achieved)])
    return float(torch.corrcoef(ranks)[0, 1]) if float(achieved.std()) > 0 else 0.0
