"""From a dataset's columns to the observations of an environment: which, in what order of axes, at what size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlflow.datasets.source import Array, Column, Source
from rlflow.types import Tree


@dataclass(frozen=True)
class Entry:
    """One entry of an observation: columns side by side, or a picture whose axes are put in order."""

    names: tuple[str, ...]
    spec: Tensor  # meta tensor of one row
    axes: tuple[int, ...] | None = None  # of a row (L, ...)

    def read(self, rows: Mapping[str, Array]) -> Tensor:
        """(L, ...) as the environment shows it."""
        arrays = [rows[name] for name in self.names]
        if self.axes is not None:
            return torch.from_numpy(arrays[0].transpose(self.axes).copy())
        flat = [array.reshape(len(array), -1) for array in arrays]
        value = torch.from_numpy(np.ascontiguousarray(np.concatenate(flat, 1)))
        return value.to(self.spec.dtype).unflatten(1, self.spec.shape)


@dataclass(frozen=True)
class Observed:
    """All entries by their names in the environment; "" where it shows a plain tensor."""

    entries: dict[str, Entry]
    wanted: dict[str, tuple[int, int] | None]
    notes: list[str]

    def read(self, rows: Mapping[str, Array]) -> Tree:
        """The observations (L, ...) of an episode's rows."""
        found = {name: entry.read(rows) for name, entry in self.entries.items()}
        return found.get("", found)


def observed(source: Source, spec: Tree, asked: Sequence[str], resize: bool) -> Observed:
    """How `source` shows what the environment does; `asked` are COLUMN+COLUMN or NAME=COLUMN+COLUMN.

    ValueError names what the environment shows, the columns there are, and the option that says which is which.
    """
    if spec is None:
        raise ValueError("the environment does not tell what it shows (obs_spec): it cannot be checked")
    leaves = spec if isinstance(spec, dict) else {"": spec}
    named = dict(_asked(leaves, asked))
    found: dict[str, Entry] = {}
    sizes: dict[str, tuple[int, int] | None] = {}
    notes: list[str] = []
    for name, leaf in leaves.items():
        columns = named.get(name) or _usual(source, name, leaf)
        if missing := [column for column in columns if column not in source.columns]:
            raise ValueError(f"--obs: {source.path} has no column {', '.join(missing)}; {_there(source)}")
        if leaf.dtype == torch.uint8 and leaf.ndim == 3:
            found[name], size = _picture(source, name, leaf, columns, resize)
            sizes[columns[0]] = size
            if size is not None:
                notes.append(f"{columns[0]} is scaled from {_frame(source.columns[columns[0]].shape)} to {size}")
        else:
            found[name] = _vector(source, name, leaf, columns)
            sizes |= dict.fromkeys(columns)
    if unused := [name for name in source.observed if name not in sizes]:
        notes.append(f"not taken: {', '.join(unused)}")
    return Observed(found, sizes, notes)


def _asked(leaves: Mapping[str, Tensor], asked: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Columns by the entry they are for."""
    for text in asked:
        name, mark, columns = text.partition("=")
        if not mark:
            name, columns = "", text
        if name not in leaves:
            shown = "a plain tensor: write COLUMN+COLUMN" if "" in leaves else f"{', '.join(leaves)}: write NAME=COLUMN"
            raise ValueError(f"--obs {text}: the environment shows {shown}")
        yield name, tuple(columns.split("+"))


def _usual(source: Source, name: str, leaf: Tensor) -> tuple[str, ...]:
    """The column that is meant where nobody says: of the same name, or else the only one of that shape."""
    if name:
        alike = [c for c in source.observed if c == name or c.replace("/", ".").rsplit(".", 1)[-1] == name]
    else:
        alike = [c for c in source.observed if math.prod(source.columns[c].shape) == leaf.numel()]
    if len(alike) == 1:
        return (alike[0],)
    flag = f"--obs {name}=COLUMN" if name else "--obs COLUMN, or --obs COLUMN+COLUMN for several side by side"
    shown = f"{name + ' ' if name else ''}{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    raise ValueError(
        f"the environment shows {shown}, and which column that is has to be said: {flag}; {_there(source)}"
    )


def _there(source: Source) -> str:
    columns = ", ".join(f"{name} {source.columns[name]}" for name in source.observed)
    return f"{source.path} has {columns or 'no columns of observations'}"


def _picture(
    source: Source, name: str, leaf: Tensor, columns: tuple[str, ...], resize: bool
) -> tuple[Entry, tuple[int, int] | None]:
    """(the entry, the size it has to be scaled to)."""
    column, shape = source.columns[columns[0]], tuple(leaf.shape)
    where = f"{columns[0]} {column}, the environment shows {name + ' ' if name else ''}uint8 {shape}"
    if len(columns) > 1 or not column.is_picture:
        raise ValueError(f"{source.path}: {where}: one column of bytes (H, W, 3) or (3, H, W) makes a picture")
    has, takes = _last(column.shape), _last(shape)
    if takes is None:
        raise ValueError(f"{source.path}: {where}: pictures of three colours are read")
    axes = (0, 1, 2, 3) if has == takes else (0, 3, 1, 2) if has else (0, 2, 3, 1)
    size = None if _frame(column.shape) == _frame(shape) else _frame(shape)
    if size is not None and not resize:
        raise ValueError(f"{source.path}: {where}: pass --resize to scale it")
    return Entry(columns, leaf, axes), size


def _last(shape: tuple[int, ...]) -> bool | None:
    """Whether the colours of a picture stand last; None where there are not three."""
    return True if shape[2] == 3 else False if shape[0] == 3 else None


def _frame(shape: tuple[int, ...]) -> tuple[int, int]:
    """(height, width)."""
    return (shape[0], shape[1]) if _last(shape) else (shape[1], shape[2])


def _vector(source: Source, name: str, leaf: Tensor, columns: tuple[str, ...]) -> Entry:
    kinds = {column: source.columns[column] for column in columns}
    num = sum(math.prod(kind.shape) for kind in kinds.values())
    bytes_for_numbers = leaf.is_floating_point() and any(kind.is_picture for kind in kinds.values())
    if num != leaf.numel() or bytes_for_numbers:
        has = " + ".join(f"{column} {kind}" for column, kind in kinds.items())
        shown = f"{name + ' ' if name else ''}{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
        raise ValueError(f"{source.path}: {has} is {num} numbers, the environment shows {shown}; {_there(source)}")
    return Entry(columns, leaf)


def picture_columns(columns: Mapping[str, Column]) -> list[str]:
    """Names of the pictures."""
    return [name for name, column in columns.items() if column.is_picture]
