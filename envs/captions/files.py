"""Text files of users, and prompts in them: .txt (a prompt a line), .jsonl (an object a line), .csv (columns by name),
and .parquet.

Text is UTF-8, with or without a byte-order mark, and its lines end in LF, CRLF or CR: of the other characters that
Unicode calls line ends (U+2028, U+0085, ...) all may stand inside a prompt.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO
from weakref import WeakValueDictionary

import numpy as np

from rlflow.envs.captions.rows import FileRows, Row, Store, TableStore, TextStore, packed

CHUNK = 2**22
"""Bytes that are looked at in one go."""

_kept: WeakValueDictionary[tuple[Any, ...], Store] = WeakValueDictionary()
"""What is in use: training and evaluation read one file, and the same parts of it."""


def read_rows(path: Path, default: Row | None = None) -> FileRows:
    """The rows of a prompt file, `default` below each; ValueError names the place that is wrong."""
    if path.suffix not in READERS:
        raise ValueError(f"{path}: a prompt file ends in {', '.join(READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file '{path}'")
    with path.open("rb") as file:
        key = str(path), json.dumps(default), hashlib.file_digest(file, "sha256").digest()
    store = _kept.get(key)
    if store is None:
        store = _kept[key] = READERS[path.suffix](path, default or {})
    return FileRows(store)


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


def _checked(path: Path) -> bytes:
    """The bytes of a user's file of text with LF alone as ends of lines, and no mark; errors as of `read_text`."""
    data = path.read_bytes()
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for part in range(0, len(data), CHUNK):
            decoder.decode(data[part : part + CHUNK])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        read_text(path)
    if b"\0" in data:
        read_text(path)
    data = data.removeprefix(codecs.BOM_UTF8)
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in data else data


def _lines(path: Path, default: Row, read: Callable[[str, str], Row] | None) -> TextStore:
    """A row for each line that is not empty, without the space around it."""
    data = _checked(path)
    bytes_ = np.frombuffer(data, np.uint8)
    parts = range(0, len(data), CHUNK)
    ends = [part + np.flatnonzero(bytes_[part : part + CHUNK] == ord("\n")) for part in parts]
    end = np.concatenate([*ends, [len(data)]]).astype(np.int64)
    begin = np.concatenate([[0], end[:-1] + 1])
    line = np.arange(1, 1 + len(end), dtype=np.int32)
    full = begin < end
    begin, end, line = begin[full], end[full], line[full]
    plain = (bytes_[begin] > ord(" ")) & (bytes_[begin] < 127) & (bytes_[end - 1] > ord(" ")) & (bytes_[end - 1] < 127)
    for i in np.flatnonzero(~plain).tolist():  # there may be space at an end, of any kind that Unicode has
        text = data[begin[i] : end[i]].decode()
        begin[i] += len(text[: len(text) - len(text.lstrip())].encode())
        end[i] = begin[i] + len(text.strip().encode())
    full = begin < end
    return TextStore(path, data, (begin[full], end[full]), line[full], default, read)


def _txt(path: Path, default: Row) -> Store:
    return _lines(path, default, None)


def _jsonl(path: Path, default: Row) -> Store:
    return _lines(path, default, _object)


def _object(line: str, place: str) -> dict[str, Any]:
    """One line of a .jsonl file."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno}): {line[:60]!r}") from None
    if not isinstance(row, dict):
        raise ValueError(f'{place}: write one object a line, {{"prompt": "...", ...}}, got {line[:60]!r}')
    return row


def _csv(path: Path, default: Row) -> Store:
    """The first line names the columns; values are text."""
    _checked(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        return packed(path, _csv_rows(path, file), default)


def _csv_rows(path: Path, file: TextIO) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(file, restkey="", strict=True)
    try:
        for row in reader:
            if "" in row or None in row.values():
                place = f"{path}:{reader.line_num}"
                raise ValueError(f"{place}: not as many values as the first line has names, {reader.fieldnames}")
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num + 1}: {error}") from None


def _parquet(path: Path, default: Row) -> Store:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path}: reading .parquet needs pyarrow: pip install 'rlflow-torch[data]'") from None
    try:
        return TableStore(path, pyarrow.parquet.read_table(path), default)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: {error}") from None


READERS: dict[str, Callable[[Path, Row], Store]] = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
