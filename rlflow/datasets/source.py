"""What every foreign dataset is here: columns by name, and episodes that are read one after the other.

Nothing is unpickled, no file outside the dataset's folder is opened, and the bytes of an episode are known, and
refused where they are too many, before they are read.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlflow.envs.captions.files import read_text

Array = NDArray[Any]
Wanted = Mapping[str, tuple[int, int] | None]
"""Columns to read, pictures scaled to (height, width)."""

MOST_BYTES = 2**31
"""Of one episode, which is held as a whole."""
MOST_TEXT = 2**28
"""Bytes of a dataset's JSON."""
EXTRA = "pip install 'rlflow-torch[data]'"

ACTION = ("actions", "action")
REWARD = ("rewards", "reward", "next.reward")
SUCCESS = ("success", "is_success", "next.success", "infos/success", "infos/is_success")


@dataclass(frozen=True)
class Column:
    """One step's entry; `coded` pictures are decoded one by one, so that a scaled one never is whole."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    coded: bool = False

    @property
    def is_picture(self) -> bool:
        """Bytes (H, W, 3) or (3, H, W)."""
        return self.dtype == np.uint8 and len(self.shape) == 3 and 3 in (self.shape[0], self.shape[2])

    def nbytes(self, size: tuple[int, int] | None) -> int:
        """Of one step as it is held."""
        shape = (*size, 3) if size and self.coded else self.shape
        return math.prod(shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class Recorded:
    """One episode of L steps as its source holds it."""

    columns: dict[str, Array]  # (L, ...) each
    terminated: bool
    truncated: bool
    success: bool | None = None


@dataclass
class Said:
    """What a dataset says of itself beside its steps."""

    env: dict[str, Any] | None = None  # name and settings, where it names a registered environment
    low: Array | None = None  # (A,) bounds of the actions
    high: Array | None = None
    control: str | None = None  # "delta" or "absolute"
    fps: float | None = None
    tasks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # for the user to read


class Source(ABC):
    """A foreign dataset. `columns` are those of a step; `observed` the names among them of what was seen."""

    format: str
    path: Path
    columns: dict[str, Column]
    observed: list[str]
    action: str
    reward: str | None
    said: Said
    lengths: list[int]
    """Steps of each episode."""

    @abstractmethod
    def episodes(self, wanted: Wanted) -> Iterator[Recorded]:
        """All of them, in order, with the columns that are wanted."""

    def check_bytes(self, episode: int, wanted: Wanted) -> None:
        """ValueError for an episode that is too large to be held."""
        rows = self.lengths[episode]
        size = rows * sum(self.columns[name].nbytes(picture) for name, picture in wanted.items())
        if size > MOST_BYTES:
            raise ValueError(
                f"{self.path}: episode {episode} has {rows} steps, {size / 2**30:.1f} GiB, and is read as a whole "
                f"(at most {MOST_BYTES / 2**30:g} GiB): name fewer columns (--obs), or smaller pictures (--resize)"
            )


def one_of(names: Mapping[str, Any], known: tuple[str, ...]) -> str | None:
    """The first of `known` that there is."""
    return next((name for name in known if name in names), None)


def action_of(path: Path, columns: Mapping[str, Any]) -> str:
    """The column of actions; ValueError names those there are."""
    name = one_of(columns, ACTION)
    if name is None:
        raise ValueError(f"{path} has no column {' or '.join(ACTION)}, it has {sorted(columns)}")
    return name


def inside(folder: Path, name: str) -> Path:
    """The file of a dataset that one of its own files names; ValueError for a name that leads out of its folder."""
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise ValueError(f"{folder}: {name!r} lies outside of the dataset's folder and is not read")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A dataset's JSON object; ValueError names the file that is none."""
    if path.stat().st_size > MOST_TEXT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, at most {MOST_TEXT} are read")
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, it must be an object")
    return found
