"""The nouns that cross module borders.

T outer steps, B envs, N = T * B rows, K denoising steps, R ratio columns, D event dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any
"""A tensor, or a dict (nested) of tensors, that all share their leading axis."""


def tree_map(fn: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Apply `fn` to every tensor of a tree."""
    if isinstance(tree, Tensor):  # a shortcut: environments call this many times a second
        return fn(tree)
    return pytree.tree_map_only(Tensor, fn, tree)


def tree_cat(trees: Sequence[Tree], dim: int = 0) -> Tree:
    """Concatenate trees of equal structure along `dim`."""
    return pytree.tree_map(lambda *leaves: torch.cat(leaves, dim), *trees)


def tree_stack(trees: Sequence[Tree], dim: int = 0) -> Tree:
    """Stack trees of equal structure along a new axis `dim`."""
    return pytree.tree_map(lambda *leaves: torch.stack(leaves, dim), *trees)


def tree_where(mask: Tensor, yes: Tree, no: Tree) -> Tree:
    """Rows of `yes` where mask (B,) is True, of `no` elsewhere; two trees of equal structure."""
    if isinstance(yes, dict):
        return {name: tree_where(mask, yes[name], no[name]) for name in yes}
    return torch.where(mask.view(-1, *[1] * (yes.ndim - 1)), yes, no)


def tree_leaves(tree: Tree) -> list[Tensor]:
    """All tensors of a tree, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def num_rows(tree: Tree) -> int:
    """Length of the common leading axis."""
    return tree_leaves(tree)[0].shape[0]


def as_bytes(texts: Sequence[str], length: int) -> Tensor:
    """Sentences in observations: (B, length) uint8 of their UTF-8, zeros behind; ValueError for a longer one."""
    coded = [text.encode() for text in texts]
    if longest := next((text for text, code in zip(texts, coded, strict=True) if len(code) > length), None):
        raise ValueError(f"a sentence of more than {length} bytes: {longest!r}")
    return torch.tensor([list(code.ljust(length, b"\0")) for code in coded], dtype=torch.uint8)


def sentences(coded: Tensor) -> list[str]:
    """Inverse of `as_bytes`."""
    return [bytes(row).rstrip(b"\0").decode() for row in coded.cpu().numpy()]


@dataclass(frozen=True)
class Cond:
    """What a network is conditioned on: named tensors with a leading row axis.

    `rows` (N,) selects from the stored rows lazily, so repeating a prompt for its group copies
    nothing until a network asks for the values. Every Cond has "pooled" (N, F): one feature vector
    per row, read by noise heads and critics.
    """

    data: dict[str, Tensor]
    rows: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        value = self.data[name]
        return value if self.rows is None else value[self.rows]

    def __len__(self) -> int:
        return num_rows(self.data) if self.rows is None else len(self.rows)

    def index(self, rows: Tensor) -> Cond:
        """The Cond of `rows` (M,), an index tensor with repeats allowed."""
        rows = rows.to(next(iter(self.data.values())).device)
        return Cond(self.data, rows if self.rows is None else self.rows[rows])

    def repeat(self, copies: int) -> Cond:
        """Every row `copies` times in a run (row 0, row 0, ..., row 1, ...); copies no data."""
        if copies == 1:
            return self
        device = next(iter(self.data.values())).device
        return self.index(torch.arange(len(self), device=device).repeat_interleave(copies))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Cond:
        """Apply `fn` to every stored tensor (detach, to a device)."""
        return Cond({name: fn(value) for name, value in self.data.items()}, self.rows)

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Concatenate along the row axis."""
        if len(conds) == 1:
            return conds[0]
        return Cond({name: torch.cat([c[name] for c in conds]) for name in conds[0].data})


@dataclass(frozen=True)
class Chain:
    """One sampled denoising chain; pairs hold the R scored transitions only."""

    final: Tensor  # (N, *D) sample before squash
    x: Tensor  # (N, R, *D) state before each scored step
    x_next: Tensor  # (N, R, *D) state after it, as stored
    t: Tensor  # (N, R)
    t_next: Tensor  # (N, R)
    mean: Tensor  # (N, R, *D) of the transition that was sampled
    std: Tensor  # (N, R, ...) broadcastable to mean
    path: Tensor | None = None  # (N, K+1, *D) only when asked for
    path_t: Tensor | None = None  # (N, K+1)
    constant: Tensor | None = None  # (N, R, *D) of a field that has `constant_calls`


@dataclass(frozen=True)
class Evidence:
    """What a likelihood needs to score a sample again: every field is (N, R, ...)."""

    x: Tensor
    x_next: Tensor
    t: Tensor
    t_next: Tensor
    old_log_prob: Tensor
    old_mean: Tensor
    old_std: Tensor
    valid: Tensor  # bool
    ref_mean: Tensor | None = None
    ref_std: Tensor | None = None
    counts: Tensor | None = None  # bool, broadcastable to x: entries of x_next whose density counts; None = all
    constant: Tensor | None = None  # as a chain's; given while the weights are those that sampled

    def map(self, fn: Callable[[Tensor], Tensor]) -> Evidence:
        """Apply `fn` to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: fn(v) for k, v in values.items() if v is not None})

    def index(self, rows: Tensor) -> Evidence:
        """The evidence of `rows` (M,)."""
        return self.map(lambda v: v.index_select(0, rows))

    def pairs(self, rows: Tensor, columns: Tensor) -> Evidence:
        """The evidence of M (row, column) pairs, as (M, 1, ...)."""
        return self.map(lambda v: v[rows, columns].unsqueeze(1))

    @staticmethod
    def cat(parts: Sequence[Evidence]) -> Evidence:
        """Concatenate along the row axis."""
        names = [f.name for f in fields(Evidence) if getattr(parts[0], f.name) is not None]
        return Evidence(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})


@dataclass(frozen=True)
class Step:
    """What an environment answers to one batched action; all tensors lead with B."""

    obs: Tree
    reward: Tensor  # (B,) float, discounted inside the step; nan where no score could be had
    terminated: Tensor  # (B,) bool
    truncated: Tensor  # (B,) bool
    final_obs: Tree | None  # observation truly reached where the episode ended, else None
    valid: Tensor  # (B,) bool; False masks the row everywhere
    info: dict[str, Tensor] = field(default_factory=dict)  # (B,) floats, nan where there is nothing to tell
    reward_parts: dict[str, Tensor] = field(default_factory=dict)  # (B,) each reward by name, nan = no score
    num_steps: Tensor | None = None  # (B,) long, primitive steps carried out, by which gamma counts; None = 1

    @property
    def ended(self) -> Tensor:
        """(B,) bool, terminated or truncated."""
        return self.terminated | self.truncated

    @property
    def reached(self) -> Tree:
        """Observations truly reached, before any automatic reset."""
        return self.obs if self.final_obs is None else tree_where(self.ended, self.final_obs, self.obs)


@dataclass
class Rollout:
    """One iteration of experience: tensors (T, B, ...), raw observations; N = T * B after `flat`."""

    obs: Tree  # (T, B, ...)
    action: Tensor  # (T, B, *D) before squash
    reward: Tensor  # (T, B)
    terminated: Tensor  # (T, B) bool
    truncated: Tensor  # (T, B) bool
    weight: Tensor  # (T, B) float; 0 masks
    last_obs: Tree  # (B, ...) observation after the last step
    final_obs: Tree | None  # (T, B, ...) observation truly reached where an episode ended; None if never truncated
    group: Tensor  # (B,) long, global group id
    row_ids: Tensor  # (T, B) long, on CPU: global, unique inside the iteration
    info: dict[str, Tensor] = field(default_factory=dict)  # (T, B)
    reward_parts: dict[str, Tensor] = field(default_factory=dict)  # (T, B) per reward, nan = no score
    reward_weights: dict[str, float] = field(default_factory=dict)  # set when they combine as advantages
    evidence: Evidence | None = None  # (T * B, R, ...)
    constant: Tensor | None = None  # (T * B, R, *D), as a chain's
    path: Tensor | None = None  # (T * B, n + 1, *D) states before the last n denoising steps, and the sample
    cond: Cond | None = None  # (T * B, ...) kept when the encoder is frozen
    num_steps: Tensor | None = None  # (T, B) long, primitive steps of each action; None = 1
    network_calls: int = 0  # network rows evaluated while sampling

    @property
    def num_rows(self) -> int:
        """N = T * B."""
        return self.reward.numel()

    def flat(self, value: Tree) -> Tree:
        """(T, B, ...) to (T * B, ...)."""
        return tree_map(lambda v: v.flatten(0, 1), value)
