"""Metrics by columns are the rows, whatever each of them has."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rlflow.report.metrics_file import CHUNK, METRICS, Metrics, encode_row, read_metrics, read_table


def write(folder: Path) -> None:
    """Rows of three forms in turn, with what is not finite, and more than are read at once."""
    lines = []
    for i in range(CHUNK + 50):
        if i % 7 == 0:
            lines.append(encode_row(i, "eval", {"eval/heldout/strict": i / 10}))
        metrics = {"a": float(i), "b": math.nan if i % 3 else -1.5} | ({"c": math.inf} if i % 5 == 0 else {})
        lines.append(encode_row(i + 1, "train", metrics))
    (folder / METRICS).write_bytes(b"".join(lines) + b'{"iteration": 3, "kind": "tr')


def test_rows_of_a_table_are_those_of_the_file(tmp_path: Path) -> None:
    write(tmp_path)
    rows, table = read_metrics(tmp_path), read_table(tmp_path)
    assert len(table) == len(rows)
    for one, other in zip(rows, table, strict=True):
        assert list(one) == list(other)
        np.testing.assert_equal(one, other)
    np.testing.assert_equal(table[5:9][1], rows[6])
    np.testing.assert_equal(table[-1], rows[-1])


def test_columns_are_the_values_of_the_rows(tmp_path: Path) -> None:
    write(tmp_path)
    rows, table = read_metrics(tmp_path), read_table(tmp_path)
    assert table.names == ["eval/heldout/strict", "a", "b", "c"]
    for name in ("iteration", *table.names, "unknown"):
        np.testing.assert_array_equal(table.column(name), [row.get(name, math.nan) for row in rows])
        if name != "iteration":
            np.testing.assert_array_equal(table.has(name), [name in row for row in rows])
    train = table.only("train")
    assert list(train.iteration) == [row["iteration"] for row in rows if row["kind"] == "train"]
    assert "eval/heldout/strict" not in train.names


def test_nothing_is_an_empty_table(tmp_path: Path) -> None:
    for table in (read_table(tmp_path), Metrics.of([])):
        assert (len(table), table.names, list(table), len(table.column("a"))) == (0, [], [], 0)


@pytest.mark.parametrize(
    "line", [3, {"iteration": 2}, {"kind": "train", "iteration": "x"}, [1], {"iteration": 1, "kind": "eval", "a": "b"}]
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: object) -> None:
    (tmp_path / METRICS).write_bytes(encode_row(1, "train", {}) + json.dumps(line).encode() + b"\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not a metrics row"):
        read_table(tmp_path)
