"""Text files of users, and prompts in them: .txt (a prompt a line), .jsonl (an object a line), .csv (columns by name),
and .parquet.

Text is UTF-8, with or without a byte-order mark, and its lines end in LF, CRLF or CR: of the other characters that
Unicode calls line ends (U+2028, U+0085, ...) all may stand inside a prompt.
"""

from __future__ import annotations

import codecs
import csv
import io
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


MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
MARKS |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
"""How files in other encodings begin; that of UTF-32 begins with that of UTF-16."""


def read_text(path: Path) -> str:
    """The text of a user's file, without a byte-order mark; ValueError names an encoding that is not UTF-8."""
    data = path.read_bytes()
    marked = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    if marked or b"\0" in data:
        raise ValueError(f"{path} is {marked or 'UTF-16 or no text'}: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, line = data[error.start], data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not UTF-8 (byte {byte:#x} in line {line}; Windows-1252 or Latin-1?): save it as UTF-8"
        ) from None


def _lines(path: Path) -> dict[str, str]:
    lines = io.StringIO(read_text(path), newline=None)
    return {f"{path}:{i}": line.strip() for i, line in enumerate(lines, 1) if line.strip()}


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
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), restkey="", strict=True)
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
