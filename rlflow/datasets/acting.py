"""The actions of a dataset, and whether they are what the environment takes: number, range and meaning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch

from rlflow.datasets.actions import ROWS, Seen, control, numbers, played
from rlflow.datasets.observed import Observed
from rlflow.datasets.source import Array, Source
from rlflow.envs.base import VecEnv
from rlflow.envs.bounds import Bounds

PART = re.compile(r"(.+?)(?:\[(\d+):(\d+)\])?")
"""COLUMN or COLUMN[first:last]."""


@dataclass(frozen=True)
class Options:
    """What the user says of a dataset."""

    obs: list[str] = field(default_factory=list)
    action: str | None = None
    reward: str | None = None
    units: str = "env"  # of the actions: the environment's own, or "unit": already stretched to [-1, 1]
    clip: bool = False
    convert: str | None = None  # to "delta" or "absolute"; "keep": whatever they are
    state: str | None = None  # where the numbers are that actions move
    resize: bool = False
    episodes: int | None = None
    trust_code: bool = False


@dataclass(frozen=True)
class Acting:
    """From the actions of a source to what a policy does, in [-1, 1] where the environment has bounds."""

    source: Source
    options: Options
    shape: tuple[int, ...]
    bounds: Bounds | None

    def __post_init__(self) -> None:
        column = self.source.columns[self.source.action]
        where = f"{self.source.path}: {self.source.action} {column}, the environment takes {self.shape}"
        if column.dtype.kind != "f":
            raise ValueError(f"{where}: a flow policy makes real vectors")
        if np.prod(column.shape) != np.prod(self.shape):
            raise ValueError(f"{where}: another number of actions")
        if self.options.convert in ("delta", "absolute") and self.options.state is None:
            raise ValueError(f"--convert {self.options.convert}: say with --state COLUMN what the actions move")

    @property
    def wanted(self) -> dict[str, None]:
        """Columns."""
        return dict.fromkeys([self.source.action, *([self._state()[0]] if self.options.state else [])])

    @property
    def limits(self) -> tuple[Array, Array]:
        """(A,) each, what actions may be in the units of the source."""
        if self.bounds is None or self.options.units == "unit":
            ones = np.ones(self.shape)
            return -ones.reshape(-1), ones.reshape(-1)
        return self.bounds.low.cpu().numpy().reshape(-1), self.bounds.high.cpu().numpy().reshape(-1)

    def _state(self) -> tuple[str, slice]:
        """The column and the numbers in it."""
        found = PART.fullmatch(self.options.state or "")
        if found is None or found[1] not in self.source.columns:
            raise ValueError(
                f"--state {self.options.state}: write COLUMN or COLUMN[0:3], of {list(self.source.columns)}"
            )
        return found[1], slice(int(found[2]), int(found[3])) if found[2] else slice(None)

    def raw(self, rows: Mapping[str, Array]) -> Array:
        """(L, A) in the source's units, as targets or changes as asked."""
        action = rows[self.source.action].reshape(len(rows[self.source.action]), -1).astype(np.float32)
        if self.options.convert not in ("delta", "absolute"):
            return action
        name, part = self._state()
        state = rows[name].reshape(len(action), -1)[:, part]
        if state.shape != action.shape:
            raise ValueError(f"--state {self.options.state}: {state.shape[1]} numbers for {action.shape[1]} actions")
        return action - state if self.options.convert == "delta" else action + state

    def made(self, rows: Mapping[str, Array]) -> torch.Tensor:
        """(L, *A) of what a policy does."""
        low, high = self.limits
        action = torch.from_numpy(self.raw(rows).clip(low, high).astype(np.float32)).unflatten(1, self.shape)
        return action if self.bounds is None or self.options.units == "unit" else self.bounds.inverse(action)


def check_actions(acting: Acting, seen: Observed, env: VecEnv) -> list[str]:
    """Notes on the actions; ValueError where they are not what the environment takes, with the option that helps."""
    _check_declared(acting)
    low, high = acting.limits
    found = Seen()
    for episode in islice(acting.source.episodes(acting.wanted), acting.options.episodes):
        found.add(acting.raw(episode.columns), low, high)
    notes = _check_range(acting, found)
    if acting.options.convert != "keep":
        _check_control(acting, seen, env)
    return notes


def _check_declared(acting: Acting) -> None:
    """Bounds that the dataset states are those of the environment."""
    said, (low, high) = acting.source.said, acting.limits
    if said.low is None or said.high is None or acting.options.convert in ("delta", "absolute"):
        return
    if said.low.size != low.size or not (np.allclose(said.low.ravel(), low) and np.allclose(said.high.ravel(), high)):
        raise ValueError(
            f"{acting.source.path} says that actions are in {_spans(said.low, said.high)}, the environment takes "
            f"{_spans(low, high)}: give its settings, or --units unit if they are stretched to [-1, 1] already"
        )


def _spans(low: Array, high: Array) -> str:
    spans = dict.fromkeys(f"[{a:g}, {b:g}]" for a, b in zip(np.ravel(low), np.ravel(high), strict=True))
    return " ".join(spans)


def _check_range(acting: Acting, found: Seen) -> list[str]:
    """Numbers beyond the bounds are refused, or clipped where that is asked for."""
    assert found.low is not None
    assert found.high is not None
    low, high = acting.limits
    over = np.flatnonzero((found.low < low - found.slack(low, high)) | (found.high > high + found.slack(low, high)))
    units, alone = acting.options.units, bool(np.isfinite(low).all() and (np.abs(high) != 1).any())
    if len(over) and not acting.options.clip:
        i = int(over[0])
        other = "" if units == "unit" else ", --units unit if they were stretched to [-1, 1] before"
        raise ValueError(
            f"{acting.source.path}: action {i} goes from {found.low[i]:g} to {found.high[i]:g}, the environment takes "
            f"{_spans(low[i], high[i])}; {found.beyond / found.rows:.1%} of the steps are beyond: --clip if it clips "
            f"them by itself, --convert delta|absolute if they mean something else{other}"
        )
    notes = [f"{found.beyond} of {found.rows} steps had actions beyond the bounds: clipped"] if found.beyond else []
    ends = np.maximum(np.abs(found.low), np.abs(found.high))
    if units == "env" and alone and bool((np.abs(ends - 1) < 1e-3).all()):
        notes.append(f"all actions end at 1, the environment takes {_spans(low, high)}: --units unit if 1 is its bound")
    return notes


def _check_control(acting: Acting, seen: Observed, env: VecEnv) -> None:
    """Targets for an environment that takes changes, or the other way round, are refused by number."""
    theirs = _control_of_data(acting, seen)
    if not any(theirs):
        return
    mine = control(played(env))
    for i, (data, world) in enumerate(zip(theirs, mine, strict=False)):
        if data and world and data != world:
            words = {"delta": "a change of what it moves", "absolute": "the target of what it moves"}
            raise ValueError(
                f"{acting.source.path}: action {i} is {words[data]}, the environment takes {words[world]}: "
                f"--convert {world} --state COLUMN[0:{len(theirs)}], or --convert keep to take them as they are"
            )


def _control_of_data(acting: Acting, seen: Observed) -> list[str | None]:
    """As measured in the first episodes, else as the dataset says."""
    flat = replace(seen, entries={n: e for n, e in seen.entries.items() if e.axes is None})
    columns = {name for entry in flat.entries.values() for name in entry.names}
    found, (low, high) = Seen(), acting.limits
    for episode in acting.source.episodes(dict.fromkeys([*acting.wanted, *columns])):
        state = numbers(flat.read(episode.columns)) if columns else None
        found.add(acting.raw(episode.columns), low, high, state)
        if found.rows >= ROWS:
            break
    measured = control(found.moves) or [None] * len(low)
    said = acting.options.convert or acting.source.said.control
    return [name or said for name in measured]
