"""HDF5: Minari's and robomimic's files, a group for each episode, and tables. Links to other files are not followed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.datasets.flat import FlatSource
from rlflow.datasets.pictures import all_scaled, decode, head
from rlflow.datasets.source import (
    EXTRA,
    REWARD,
    SUCCESS,
    Array,
    Column,
    Recorded,
    Said,
    Source,
    Wanted,
    action_of,
    one_of,
    read_json,
)
from rlflow.datasets.tables import Table, Take, longest

DEEPEST = 8
"""Groups inside groups."""
ROWS = 4096
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG"


def h5py() -> Any:
    """The library; ModuleNotFoundError says what installs it."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: {EXTRA}", name=error.name) from None
    return h5py


def open_file(path: Path) -> Any:
    """An HDF5 file to read; ValueError where it is none."""
    try:
        return h5py().File(path, "r")
    except OSError as error:
        if not path.is_file():
            raise
        raise ValueError(f"{path} is no HDF5 file: {error}") from None


def own(group: Any, name: str) -> Any:
    """An entry of a group that lies in the same file; ValueError for a link, which is not opened."""
    if not isinstance(group.get(name, getlink=True), h5py().HardLink):
        where = f"{group.file.filename}: {group.name.rstrip('/')}/{name}"
        raise ValueError(f"{where} is a link, which is not followed: copy what it leads to")
    return group[name]


def datasets(group: Any, depth: int = 0) -> dict[str, Any]:
    """All arrays below a group by their paths; ValueError for one that lies in another file."""
    library = h5py()
    found: dict[str, Any] = {}
    for name in group:
        where = f"{group.file.filename}: {group.name.rstrip('/')}/{name}"
        entry = own(group, name)
        if isinstance(entry, library.Group):
            if depth == DEEPEST:
                raise ValueError(f"{where}: groups lie more than {DEEPEST} deep")
            found |= {f"{name}/{inner}": value for inner, value in datasets(entry, depth + 1).items()}
        elif isinstance(entry, library.Dataset):
            if entry.external or entry.is_virtual:
                raise ValueError(f"{where} keeps its numbers in another file, which is not read: copy them")
            found[name] = entry
    return found


def column_of(data: Any, where: str) -> Column | None:
    """Shape and dtype of a row; None for what is no numbers."""
    if _is_coded(data):
        return Column(head(bytes(data[0]), where), np.dtype(np.uint8), coded=True)
    return Column(tuple(data.shape[1:]), data.dtype) if data.ndim and data.dtype.kind in "biuf" else None


def _is_coded(data: Any) -> bool:
    """Pictures as JPEG or PNG, a list of bytes each; of equal lengths they make a plain array."""
    listed = data.ndim == 1 and h5py().check_vlen_dtype(data.dtype) == np.uint8
    packed = data.ndim == 2 and data.dtype == np.uint8 and data.shape[1] > len(PNG)
    return (listed or packed) and len(data) > 0 and bytes(data[0][:4]).startswith((JPEG, PNG))


def rows_of(data: Any, column: Column, first: int, num: int, size: tuple[int, int] | None, where: str) -> Array:
    """(num, ...) rows from `first`."""
    if column.coded:
        return np.stack([decode(bytes(data[i]), column.shape, size, where) for i in range(first, first + num)])
    return np.asarray(data[first : first + num])


class HDF5Table(Table):
    """Arrays of one length in a file."""

    def __init__(self, path: Path, file: Any):
        self.path, self.unread, found = path, {}, {}
        self.data = datasets(file)
        for name, data in self.data.items():
            if (column := column_of(data, f"{path}: {name}")) is not None:
                found[name] = column
        sizes = {name: len(self.data[name]) for name in found}
        self.rows = longest(sizes)
        self.columns = {name: column for name, column in found.items() if sizes[name] == self.rows}
        self.others = {name: rows for name, rows in sizes.items() if rows != self.rows}

    def open(self, name: str, size: tuple[int, int] | None = None) -> Take:
        """Slices, one behind the other."""
        at, data = 0, self.data[name]
        column = self.columns.get(name) or Column(tuple(data.shape[1:]), data.dtype)

        def take(num: int) -> Array:
            nonlocal at
            at += num
            return rows_of(data, column, at - num, num, size, f"{self.path}: {name}")

        return take


class GroupedSource(Source):
    """A group for each episode, named PREFIX and a number."""

    ends: tuple[str, str]
    """Its columns of flags: by the task, by time."""

    def __init__(self, path: Path, groups: Any, prefix: str):
        self.path, self.said = path, Said()
        numbered = [(int(n.removeprefix(prefix)), n) for n in groups if n.removeprefix(prefix).isdecimal()]
        self.groups = [own(groups, name) for _, name in sorted(numbered)]
        if not self.groups or not all(isinstance(group, h5py().Group) for group in self.groups):
            raise ValueError(f"{path} has no episodes ({prefix}0, ...)")
        first = datasets(self.groups[0])
        self.action = action_of(path, first)
        rows = len(first[self.action])
        columns = {n: column_of(d, f"{path}: {n}") for n, d in first.items() if len(d.shape) and len(d) >= rows}
        self.columns = {name: column for name, column in columns.items() if column is not None}
        self.reward = one_of(self.columns, REWARD)
        self.lengths = [len(group[self.action]) for group in self.groups]

    def episodes(self, wanted: Wanted) -> Iterator[Recorded]:
        """A group at a time."""
        for number, (group, length) in enumerate(zip(self.groups, self.lengths, strict=True)):
            self.check_bytes(number, wanted)
            data = datasets(group)
            rows = {
                n: self._rows(data, n, length, size, f"{self.path}: {group.name}/{n}") for n, size in wanted.items()
            }
            yield self.ended(rows, data)

    def _rows(self, data: dict[str, Any], name: str, length: int, size: tuple[int, int] | None, where: str) -> Array:
        if name not in data or len(data[name]) < length or column_of(data[name], where) != self.columns[name]:
            raise ValueError(f"{where} is not {length} rows of {self.columns[name]}, as in the first episode")
        return all_scaled(rows_of(data[name], self.columns[name], 0, length, size, where), size)

    def ended(self, rows: dict[str, Array], data: dict[str, Any]) -> Recorded:
        """The episode with the way in which it ended."""
        raise NotImplementedError


def _any(data: dict[str, Any], name: str | None) -> bool | None:
    """Whether a column of flags, read in pieces, has one; None where there is no such column."""
    if name is None or name not in data:
        return None
    return any(bool(np.any(data[name][first : first + ROWS])) for first in range(0, len(data[name]), ROWS))


class MinariSource(GroupedSource):
    """Minari's: observations have one row more than actions, the last of which is where the episode ended."""

    format = "Minari"

    def __init__(self, path: Path, main: Path):
        super().__init__(path, open_file(main), "episode_")
        self.observed = [n for n in self.columns if n == "observations" or n.startswith("observations/")]
        beside = main.parent / "metadata.json"
        self._read_spaces(read_json(beside) if beside.exists() else {})

    def _read_spaces(self, about: dict[str, Any]) -> None:
        """The environment it names, and the bounds of its actions."""
        with_texts = {name: text for name, text in about.items() if isinstance(text, str)}
        try:
            env, space = (json.loads(with_texts.get(name, "{}")) for name in ("env_spec", "action_space"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}: env_spec or action_space is not JSON: {error}") from None
        if isinstance(env, dict) and isinstance(env.get("id"), str):
            self.said.env = {"name": "gym", "settings": {"env_id": env["id"]}}
        if isinstance(space, dict) and space.get("type") == "Box":
            self.said.low, self.said.high = (np.asarray(space[end], np.float64) for end in ("low", "high"))

    def ended(self, rows: dict[str, Array], data: dict[str, Any]) -> Recorded:
        """`terminations` and `truncations`; success where an info of that name tells it."""
        terminated = bool(_any(data, "terminations"))
        return Recorded(rows, terminated, not terminated, _any(data, one_of(data, SUCCESS)))


class RobomimicSource(GroupedSource):
    """robomimic's: data/demo_N with obs/NAME; a reward of 1 is success, `dones` may mark the end of any episode."""

    format = "robomimic"

    def __init__(self, path: Path, file: Any):
        super().__init__(path, file["data"], "demo_")
        self.observed = [name for name in self.columns if name.startswith("obs/")]
        try:
            made = json.loads(file["data"].attrs.get("env_args", "{}"))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}: data.attrs['env_args'] is not JSON: {error}") from None
        settings = made.get("env_kwargs", {}) if isinstance(made, dict) else {}
        delta = (settings.get("controller_configs") or {}).get("control_delta")
        self.said.control = None if delta is None else "delta" if delta else "absolute"
        if isinstance(made, dict) and "env_name" in made:
            self.said.notes.append(f"recorded in {made['env_name']}")

    def ended(self, rows: dict[str, Array], data: dict[str, Any]) -> Recorded:
        """It terminates where it succeeds."""
        success = _any(data, self.reward)
        terminated = bool(success and _any(data, "dones"))
        return Recorded(rows, terminated, not terminated, success)


def open_hdf5(path: Path) -> Source:
    """Whichever of the three it is."""
    file = open_file(path)
    data = own(file, "data") if "data" in file else None
    if isinstance(data, h5py().Group) and any(name.startswith("demo_") for name in data):
        return RobomimicSource(path, file)
    if any(name.startswith("episode_") for name in file):
        return MinariSource(path, path)
    return FlatSource(HDF5Table(path, file), "HDF5")
