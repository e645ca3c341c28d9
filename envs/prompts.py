"""Prompt tables: rows of columns, one of them "prompt"; from worlds of captions or from a file of the user."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rlflow.envs.captions import geneval, scenes, signs, words
from rlflow.envs.captions.files import READERS, read_rows
from rlflow.envs.captions.rows import FileRows, Row, check_row
from rlflow.flow.noise import generator

log = logging.getLogger(__name__)

T = TypeVar("T")
Split = Literal["train", "heldout"]
HELD_OUT = 5  # one in so many distinct prompts of a file
FEWEST = 10  # distinct prompts of a file that is split


@dataclass(frozen=True)
class Prompts:
    """A table of prompts; duplicates are fine, since groups are told apart by number and not by text."""

    rows: Sequence[Row]
    places: Sequence[str] = ()
    """Where each row was read, FILE:LINE; empty for an embedded world."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("the prompt table is empty")
        if isinstance(self.rows, FileRows):
            _ = self.rows.keys  # every row was looked at
            return
        names = set(self.rows[0])
        for i, row in enumerate(self.rows):
            check_row(row, names, self.place(i))

    def place(self, row: int) -> str:
        """What to call a row in a message."""
        return self.places[row] if self.places else f"prompt row {row}"

    def check(self, tokenize: Callable[[list[str]], Any]) -> None:
        """Tokenise every prompt once; ValueError names the first that the model cannot read, and why."""
        rows = self.rows
        keys = rows.keys if isinstance(rows, FileRows) else np.array([hash(row["prompt"]) for row in rows])
        backwards, first = (np.unique(k, return_index=True)[1] for k in (keys[::-1], keys))
        distinct = len(rows) - 1 - np.sort(backwards)
        for part in (distinct[i : i + 1024].tolist() for i in range(0, len(distinct), 1024)):
            try:
                tokenize([rows[i]["prompt"] for i in part])
            except ValueError:
                for i in np.sort(first[np.isin(keys[first], keys[part])]).tolist():
                    self._check_one(tokenize, rows[i]["prompt"], i)
                raise

    def _check_one(self, tokenize: Callable[[list[str]], Any], text: str, row: int) -> None:
        try:
            tokenize([text])
        except ValueError as error:
            raise ValueError(f"{self.place(row)}: {text!r}: {error}") from None

    @property
    def columns(self) -> list[str]:
        """Column names."""
        return list(self.rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def index(self, serial: Sequence[int], seed: int) -> list[int]:
        """Row of each serial number: every epoch is a fresh permutation, so nothing repeats before all were seen."""
        n = len(self)
        return [int(_order(n, seed, s // n)[s % n]) for s in serial]

    def take(self, index: Sequence[int]) -> dict[str, list[Any]]:
        """Columns of the rows `index`."""
        rows = [self.rows[i] for i in index]
        return {name: [row[name] for row in rows] for name in self.columns}


@lru_cache(maxsize=2)
def _order(num: int, seed: int, epoch: int) -> NDArray[Any]:
    """A permutation of `num` rows."""
    order = torch.randperm(num, generator=generator("prompts", seed, epoch)).numpy()
    return order.astype(np.int32) if num < 2**31 else order


def _equal_shares(pools: Sequence[Sequence[T]]) -> list[T]:
    """One list in which every pool has about the same share, by repeating the short ones."""
    longest = max(len(p) for p in pools)
    return [item for pool in pools for item in list(pool) * max(1, round(longest / len(pool)))]


@cache
def _scenes(kinds: str, split: Split) -> Prompts:
    chosen = kinds.split(",") if kinds else list(scenes.KINDS)
    if unknown := [k for k in chosen if k not in scenes.KINDS]:
        raise ValueError(f"unknown kind of scene {unknown}: choose from {list(scenes.KINDS)}")
    pools = [scenes.split(split == "heldout", (kind,)) for kind in chosen]
    return Prompts(tuple({"prompt": text} for text in _equal_shares(pools)))


@cache
def _words(kinds: str, split: Split) -> Prompts:
    texts = words.heldout_texts() if split == "heldout" else words.train_texts()
    return Prompts(tuple({"prompt": words.caption(t), "text": t} for t in texts))


def _geneval(kinds: str, split: Split) -> Prompts:
    if kinds.endswith(".jsonl"):  # GenEval's own file, in which only counting has what is excluded
        return _of_file(read_rows(Path(kinds), {"exclude": []}))
    chosen = kinds.split(",") if kinds else list(geneval.KINDS)
    if unknown := [k for k in chosen if k not in geneval.KINDS]:
        raise ValueError(f"unknown category {unknown}: choose from {list(geneval.KINDS)}, or give a .jsonl file")
    pools = [geneval.rows(kind, split == "heldout") for kind in chosen]
    return Prompts(tuple(_equal_shares(pools)))


@cache
def _signs(kinds: str, split: Split) -> Prompts:
    return Prompts(tuple(signs.rows(split == "heldout")))


WORLDS: dict[str, Callable[[str, Split], Prompts]] = {
    "scenes": _scenes,
    "words": _words,
    "geneval": _geneval,
    "signs": _signs,
}
"""Prompts by name, as in scenes, scenes:pair, geneval:counting,colors, geneval:FILE.jsonl."""
WITH_KINDS = ("scenes", "geneval")


def _of_file(rows: FileRows) -> Prompts:
    return Prompts(rows, rows.places)


def _part(prompts: Prompts, source: str, split: Split) -> Prompts:
    """The split's rows of a file: a fifth of the distinct prompts, those of the least hashes, is held out."""
    assert isinstance(prompts.rows, FileRows)
    store = prompts.rows.store
    distinct = 1 + int(store.ranks.max())
    if distinct < FEWEST:
        if split == "heldout":
            log.warning(
                "%s has %d distinct prompts, too few to hold some out: evaluation uses those of training; "
                "give %d or more, or another file as eval.prompts",
                *(source, distinct, FEWEST),
            )
        return prompts
    held = store.ranks < distinct // HELD_OUT
    return _of_file(FileRows(store, np.flatnonzero(held == (split == "heldout")).astype(np.int32)))


def load_prompts(source: str, split: Split = "train", *, whole: bool = False) -> Prompts:
    """'scenes', 'scenes:pair', 'words', 'geneval', 'signs', or a .txt, .jsonl, .csv or .parquet file.

    The worlds know which captions are held out. Of a file with 10 distinct prompts or more a fifth is, unless it is
    used `whole`, as where eval.prompts names another one.
    """
    world, colon, kinds = source.partition(":")
    if world in WORLDS and (not colon or world in WITH_KINDS):
        prompts, is_file = WORLDS[world](kinds, split), kinds.endswith(".jsonl")
    elif Path(source).suffix in READERS:
        prompts, is_file = _of_file(read_rows(Path(source))), True
    else:
        raise ValueError(f"prompts {source!r}: give a file ({', '.join(READERS)}), or one of {sorted(WORLDS)}")
    return _part(prompts, source, split) if is_file and not whole else prompts
