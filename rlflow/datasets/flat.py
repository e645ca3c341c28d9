"""One table of steps: OGBench's and other .npz, parquet, D4RL's HDF5. A column says where episodes end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from rlflow.datasets.pictures import all_scaled
from rlflow.datasets.source import (
    ACTION,
    REWARD,
    SUCCESS,
    Array,
    Recorded,
    Said,
    Source,
    Wanted,
    action_of,
    one_of,
)
from rlflow.datasets.tables import Table

TERMINAL = ("terminals", "terminations", "terminated", "dones", "done", "next.done")
TIMEOUT = ("timeouts", "truncations", "truncated")
EPISODE = ("episode_index", "episode_id", "episode", "episode_ids")
LENGTH = ("traj_lengths", "episode_lengths")
COUNTERS = ("frame_index", "timestamp", "index", "task_index", "masks", "next_observations")
"""Columns that nobody saw."""


class FlatSource(Source):
    """Steps of all episodes one behind the other."""

    def __init__(self, table: Table, form: str):
        self.table, self.path, self.format = table, table.path, form
        self.columns, self.said = table.columns, Said()
        self.action, self.reward = action_of(self.path, self.columns), one_of(self.columns, REWARD)
        self.terminal, self.timeout = one_of(self.columns, TERMINAL), one_of(self.columns, TIMEOUT)
        self.succeeded = one_of(self.columns, SUCCESS)
        named = {*ACTION, *REWARD, *SUCCESS, *TERMINAL, *TIMEOUT, *EPISODE, *COUNTERS}
        self.observed = [name for name in self.columns if name not in named]
        self.ends = self._ends()
        self.unused = self._unused()
        self.lengths = [end - start - self.unused for start, end in pairwise([0, *self.ends])]
        if min(self.lengths, default=0) < 1:
            raise ValueError(f"{self.path}: episode {self.lengths.index(min(self.lengths))} has no step")
        self.said.notes += [f"{name} {why}" for name, why in table.unread.items()]

    def _unused(self) -> int:
        """Rows at the end of an episode in which nothing is done any more."""
        if self.format != "npz" or self.terminal != "terminals" or self.reward or self.timeout:
            return 0
        self.format = "OGBench npz"
        self.said.notes.append("the last row of each episode shows where it ended, its action was not carried out")
        return 1

    def _ends(self) -> list[int]:
        """The row behind each episode; ValueError where no column tells."""
        lengths, number = one_of(self.table.others, LENGTH), one_of(self.columns, EPISODE)
        if lengths:
            ends = np.cumsum(np.concatenate(list(self.table.scan(lengths))))
        elif number:
            ends = self._changes(number)
        elif self.terminal or self.timeout:
            ends = np.unique(np.concatenate([self._marked(name) for name in (self.terminal, self.timeout) if name]))
        else:
            known = ", ".join((*TERMINAL, *TIMEOUT, *EPISODE, *LENGTH))
            raise ValueError(f"{self.path} does not say where episodes end: name a column as one of {known}")
        found = [int(end) for end in ends]
        if not found or found[-1] > self.table.rows or any(b <= a for a, b in pairwise([0, *found])):
            raise ValueError(f"{self.path}: its episodes do not end inside its {self.table.rows} rows")
        return found if found[-1] == self.table.rows else [*found, self.table.rows]

    def _changes(self, name: str) -> Array:
        """Rows behind which the number of the episode changes."""
        found, first, last = [], 0, None
        for block in self.table.scan(name):
            before = block[:1] if last is None else last
            found.append(first + np.flatnonzero(np.diff(np.concatenate([before, block]))))
            first, last = first + len(block), block[-1:]
        return np.append(np.concatenate(found), first) if found else np.empty(0, int)

    def _marked(self, name: str) -> Array:
        """The rows behind those that are marked."""
        found, first = [np.empty(0, int)], 0
        for block in self.table.scan(name):
            found.append(first + 1 + np.flatnonzero(block.reshape(len(block))))
            first += len(block)
        return np.concatenate(found)

    def episodes(self, wanted: Wanted) -> Iterator[Recorded]:
        """Rows are read once, from the first to the last."""
        marks = [name for name in (self.terminal, self.timeout, self.succeeded) if name]
        readers = {name: self.table.open(name, wanted.get(name)) for name in {*wanted, *marks}}
        for number, length in enumerate(self.lengths):
            self.check_bytes(number, wanted)
            rows = {name: take(length + self.unused)[:length] for name, take in readers.items()}
            told = {name: bool(rows[name].any()) for name in marks}
            terminated = bool(self.terminal and not self.unused and told[self.terminal])
            success = told[self.succeeded] if self.succeeded else None
            columns = {name: all_scaled(rows[name], size) for name, size in wanted.items()}
            yield Recorded(columns, terminated, not terminated, success)
