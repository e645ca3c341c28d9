"""The shapes and dtypes an environment promises, looked at once; and rows of numbers that are not finite.

What has another shape than (B,) broadcasts in silence: a reward () pays every row alike, one of (B, 1) makes (B, B).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlflow.parallel import dist
from rlflow.types import Step, Tree, tree_leaves

KINDS: dict[str, Callable[[torch.dtype], bool]] = {
    "float": lambda dtype: dtype.is_floating_point,
    "bool": lambda dtype: dtype == torch.bool,
    "whole": lambda dtype: not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool),
    "real": lambda dtype: not dtype.is_complex,
}
"""What a column may hold, by the word that a message has for it."""


def check_columns(where: str, num: int, kind: str, columns: Mapping[str, Any]) -> None:
    """ValueError names the first of `columns` that is not a tensor (num,) of a kind; None counts as left out."""
    for name, value in columns.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: {name} is a {type(value).__name__}, it must be a tensor ({num},) of {kind}")
        if value.shape != (num,) or not KINDS[kind](value.dtype):
            raise ValueError(
                f"{where}: {name} has shape {tuple(value.shape)} and dtype {value.dtype}, "
                f"it must be ({num},) {kind}: one number for each row"
            )


def check_observation(where: str, num: int, obs: Tree, spec: Tree) -> None:
    """ValueError where `obs` is not `num` rows of `spec` (meta tensors of one row; None where it is not told)."""
    if isinstance(spec, dict):
        if not isinstance(obs, dict) or obs.keys() != spec.keys():
            found = sorted(obs) if isinstance(obs, dict) else type(obs).__name__
            raise ValueError(f"{where} has {found}, obs_spec {sorted(spec)}")
        for name, part in spec.items():
            check_observation(f"{where}[{name!r}]", num, obs[name], part)
        return
    leaves = [obs] if isinstance(spec, Tensor) else tree_leaves(obs)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{where} is a {type(leaf).__name__}, it must be a tensor: obs_spec says so")
        wanted = (num, *(leaf.shape[1:] if spec is None else spec.shape))
        dtype = leaf.dtype if spec is None else spec.dtype
        if leaf.shape != wanted or leaf.dtype != dtype:
            raise ValueError(
                f"{where} has shape {tuple(leaf.shape)} and dtype {leaf.dtype}, it must be {wanted} {dtype}"
            )


def check_step(where: str, num: int, step: Step, spec: Tree) -> None:
    """ValueError names the field of a Step of `num` rows that is not what the contract says."""
    check_observation(f"{where}: obs", num, step.obs, spec)
    if step.final_obs is not None:
        check_observation(f"{where}: final_obs", num, step.final_obs, spec)
    check_columns(where, num, "float", {"reward": step.reward})
    flags = {"terminated": step.terminated, "truncated": step.truncated, "valid": step.valid}
    check_columns(where, num, "bool", flags)
    check_columns(where, num, "whole", {"num_steps": step.num_steps})
    check_columns(where, num, "real", {f"info[{name!r}]": value for name, value in step.info.items()})
    check_columns(where, num, "float", {f"reward_parts[{name!r}]": v for name, v in step.reward_parts.items()})


def finite_rows(value: Tensor) -> Tensor:
    """(B,) True where all numbers of a row (B, ...) are finite."""
    return value.isfinite().flatten(1).all(1) if value.ndim > 1 else value.isfinite()


def keep_rows(rows: Tensor, value: Tensor) -> Tensor:
    """`value` (B, ...) where `rows` (B,) is True, else 0."""
    return torch.where(rows.view(-1, *[1] * (value.ndim - 1)), value, 0.0)


class BadRows:
    """Counts the steps that are left out because of numbers that are not finite, and says so once."""

    def __init__(self, where: str, device: torch.device):
        self.where = where
        self.count = torch.zeros((), dtype=torch.long, device=device)  # nobody waits for it before `metrics`
        self.told = False

    def add(self, rows: Tensor) -> None:
        """Those of a mask (B,)."""
        self.count = self.count + rows.sum()

    def metrics(self) -> dict[str, float]:
        """Their number since the last call, over all ranks, where there were any; all ranks have to ask at once."""
        num = int(dist.all_sum(self.count))
        self.count = torch.zeros_like(self.count)
        if num and not self.told and dist.rank() == 0:
            self.told = True
            warnings.warn(
                f"{self.where}: {num} steps met an observation or an action that is not finite (nan or infinite): none "
                "of them is learnt from, an evaluation goes on with the numbers before; env/bad_rows counts them",
                stacklevel=2,
            )
        return {"env/bad_rows": float(num)} if num else {}
