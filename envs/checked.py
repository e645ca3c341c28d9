"""Checked: an environment whose answers are looked at before anyone learns from them.

One row of nan would make every gradient nan, since 0 * nan is nan. So the numbers of an observation that are not
finite are replaced by those its row showed before, an action that is not finite by 0, and the steps that saw them,
reached them without an end or were sent them are not valid: masked, never learnt from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlflow.envs.base import VecEnv
from rlflow.envs.contract import BadRows, check_observation, check_step, finite_rows, keep_rows
from rlflow.envs.wrappers import Wrapper
from rlflow.types import Step, Tree, tree_map

NUMPY_READS = (torch.float32, torch.float64)


class Checked(Wrapper):
    """`env` under the name it has in messages; shapes and dtypes are looked at in the first reset and step only.

    Where a step ended the episode by its task, what it reached is never asked for, so it stays valid.
    """

    def __init__(self, env: VecEnv, name: str):
        super().__init__(env)
        self.name = f"env {name}"
        self.bad = BadRows(self.name, env.device)
        self.last: Tree = None  # finite numbers that each row showed last
        self.blind, self.lost = torch.zeros(2, env.num_envs, dtype=torch.bool, device=env.device)
        self._sound = False  # True: known on the CPU that no row is blind or lost
        self._looked = False

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        """First observations, finite."""
        obs = self.env.reset(seeds, mask)
        if self.last is None:
            check_observation(f"{self.name}: the observation of a reset", self.num_envs, obs, self.obs_spec)
            self.last = tree_map(torch.zeros_like, obs)
        self.last, self.blind = self._finite(obs)
        self._sound = self._known((self.blind, self.lost))
        return self.last

    def send(self, action: Tensor, rows: slice) -> None:
        """Hand over finite actions."""
        if self._sound and _all_finite(action):
            self.env.send(action, rows)
            return
        self._sound, good = False, finite_rows(action)
        self.lost[rows] = ~good.to(self.device)
        self.env.send(keep_rows(good, action), rows)

    def recv(self) -> Step:
        """The step with finite observations, not valid where a stand-in was acted on or is bootstrapped from."""
        step = self.env.recv()
        if not self._looked:
            check_step(self.name, self.num_envs, step, self.obs_spec)
            self._looked = True
        final = step.final_obs
        if self._sound and _all_finite(step.obs) and (final is None or final is step.obs or _all_finite(final)):
            self.last = step.obs
            return step
        obs, blind = self._finite(step.obs)
        unseen = blind
        if final is step.obs:
            final = obs
        elif final is not None:
            final, there = self._finite(final)
            unseen = torch.where(step.ended, there, blind)
        masked = self.blind | self.lost | (unseen & ~step.terminated)
        self.bad.add(step.valid & masked)
        self.last, self.blind, self.lost = obs, blind, torch.zeros_like(self.lost)
        self._sound = self._known((blind,))
        return replace(step, obs=obs, final_obs=final, valid=step.valid & ~masked)

    def _known(self, masks: Sequence[Tensor]) -> bool:
        """True where no row is in any of them; elsewhere than on the CPU the answer would be waited for."""
        return self.device.type == "cpu" and not any(bool(mask.any()) for mask in masks)

    def _finite(self, obs: Tree) -> tuple[Tree, Tensor]:
        """(`obs` with stand-ins, the rows (B,) that have any)."""
        bad = torch.zeros_like(self.blind)
        for leaf in _floats(obs):
            bad = bad | ~finite_rows(leaf)
        if self._known((bad,)):
            return obs, bad
        return _filled(obs, tree_map(torch.zeros_like, obs) if self.last is None else self.last), bad

    def metrics(self) -> dict[str, float]:
        """Those of the environment inside, and the steps that were masked here."""
        return self.env.metrics() | self.bad.metrics()

    def own_state(self) -> dict[str, Any]:
        return {} if self.last is None else {"last": self.last, "blind": self.blind}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; a state of the environment alone is of a run from before it was checked."""
        if state.keys() == {"env", "own"}:
            super().load_state_dict(state)
        else:
            self.env.load_state_dict(state)

    def load_own_state(self, state: dict[str, Any]) -> None:
        if state:
            self.last, self.blind, self._sound = state["last"], state["blind"], False


def _floats(obs: Tree) -> list[Tensor]:
    """The tensors of real numbers; pixels and words are always finite."""
    leaves = [leaf for part in obs.values() for leaf in _floats(part)] if isinstance(obs, dict) else [obs]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def _all_finite(tree: Tree) -> bool:
    """True where it is known, of tensors that NumPy reads; PyTorch takes thrice the time, at every step."""
    if isinstance(tree, dict):
        return all(_all_finite(part) for part in tree.values())
    if tree.device.type != "cpu" or tree.dtype not in NUMPY_READS:
        return not tree.is_floating_point()
    return np.count_nonzero(np.isfinite(tree.detach().numpy())) == tree.numel()


def _filled(obs: Tree, last: Tree) -> Tree:
    """`last` where a number of `obs` is not finite."""
    if isinstance(obs, dict):
        return {name: _filled(part, last[name]) for name, part in obs.items()}
    return torch.where(obs.isfinite(), obs, last) if obs.is_floating_point() else obs
