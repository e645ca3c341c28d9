"""Prompt files of the user: .txt (a prompt a line), .jsonl (an object a line), .csv and .parquet (columns by name)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = dict[str, dict[str, Any]]
"""The columns of each row by the place where it was read, FILE:LINE."""


def read_rows(path: Path) -> Rows:
    """The rows of a prompt file; ValueError names the place that is wrong."""
    if path.suffix not in READERS:
        raise ValueError(f"{path}: a prompt file ends in {', '.join(READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file '{path}'")
    return READERS[path.suffix](path)


def _lines(path: Path) -> dict[str, str]:
    text = path.read_text(encoding="utf-8")
    return {f"{path}:{i}": line.strip() for i, line in enumerate(text.splitlines(), 1) if line.strip()}


def _txt(path: Path) -> Rows:
    return {place: {"prompt": line} for place, line in _lines(path).items()}


def _jsonl(path: Path) -> Rows:
    return {place: _object(line, place) for place, line in _lines(path).items()}


def _object(line: str, place: str) -> dict[str, Any]:
    """One line of a .jsonl file."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno}): {line[:60]!r}") from None
    if not isinstance(row, dict):
        raise ValueError(f'{place}: write one object a line, {{"prompt": "...", ...}}, got {line[:60]!r}')
    return row


def _csv(path: Path) -> Rows:
    """The first line names the columns; values are text."""
    rows: Rows = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="", strict=True)
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if "" in row or None in row.values():
                    raise ValueError(f"{place}: not as many values as the first line has names, {reader.fieldnames}")
                rows[place] = dict(row)
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num + 1}: {error}") from None
    return rows


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path}: reading .parquet needs pyarrow: pip install 'rlflow-torch[data]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: {error}") from None
    return {f"{path}:{i}": row for i, row in enumerate(table.to_pylist(), 1)}


READERS: dict[str, Callable[[Path], Rows]] = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
