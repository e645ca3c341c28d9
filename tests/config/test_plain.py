"""YAML is read as plain values or refused with its line; nothing is taken for something that was not written."""

from datetime import date
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from rlflow.config import plain, recipes
from rlflow.config.parse import parse
from rlflow.train.table import read_table

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "\n".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdef", "bcdefg", strict=True)
)

REFUSED = {
    "twice": ("a: 1\nb: {c: 1, c: 2}", r"line 2, column 11: the key 'c' stands twice"),
    "whole number as key": ("a: {1: x}", r"line 1, column 5: the key '1' is no text"),
    "word of YAML as key": ("no: x", r"line 1, column 1: the key 'no' is no text"),
    "nan as key": (".nan: 1", r"line 1, column 1: the key '\.nan' is no text"),
    "list as key": ("? [a, b]\n: 1", r"line 1, column 3: the key of several parts is no text"),
    "set": ("a: !!set {x}", r"line 1, column 4: a tag !!set"),
    "bytes": ("a: !!binary aGk=", r"line 1, column 4: a tag !!binary"),
    "date on purpose": ("a: !!timestamp 2026-01-01", r"line 1, column 4: a tag !!timestamp"),
    "code": ("a: !!python/name:os.getcwd", r"line 1, column 4: a tag .*python/name:os\.getcwd"),
    "list in itself": ("a: &a [*a]", r"an alias that holds itself"),
    "mapping in itself": ("a: &a {b: {c: *a}}", r"an alias that holds itself"),
    "merged into itself": ("a: &a {<<: *a}", r"an alias that holds itself"),
    "aliases of aliases": (BOMB, r"more than 100,000 values, aliases unfolded"),
    "depth": ("[" * 600, r": nested too deeply$"),
    "digits": ("a: " + "9" * 5000, r"line 1, column 4: a number of 5000 characters"),
    "two documents": ("a: 1\n---\nb: 1", r"is not YAML in line 2"),
    "control characters": ("a: \x00", r"is not YAML: unacceptable character|is UTF-16 or no text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_is_one_line_with_its_place(case: str, tmp_path: Path) -> None:
    """In a recipe, in the table of a sweep, and as the value of an override."""
    text, message = REFUSED[case]
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        recipes.read(str(file))
    assert str(error.value).startswith(f"recipe {str(file)!r}")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        read_table(file)
    with pytest.raises(ValueError, match=message):
        recipes.apply({}, [f"about={text}"])


def test_bytes_that_are_no_text_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"about: \xff\n")
    with pytest.raises(ValueError, match=r"x\.yaml is not UTF-8 \(byte 0xff in line 1; .*\): save it as UTF-8$"):
        recipes.read(str(tmp_path / "x.yaml"))


@pytest.mark.parametrize("text", ["2026-01-01", "2026-01-01 10:00:00", "1:30", "12:30:45", "=", "089", "."])
def test_dates_and_clocks_are_text(text: str) -> None:
    assert plain.load(f"a: {text}") == {"a": text}


def test_quoted_numbers_are_text() -> None:
    assert plain.load("a: '1e3'\nb: 1e3\nc: \"5\"") == {"a": "1e3", "b": 1000, "c": "5"}


def test_what_is_written_is_read_back() -> None:
    """Texts that look like something else above all."""
    texts = [
        "1e3",
        "1e-4",
        "2026-01-01",
        "1:30",
        "yes",
        "null",
        "0x1f",
        ".5e3",
        "1.",
        "=",
        "<<",
        "~",
        "089",
        "5",
        ".inf",
    ]
    values = {"texts": [*texts, "", "é\n: #"], "numbers": [1e-8, 1e30, float("inf"), -5, None, True]}
    assert plain.load(plain.dump(values)) == values


def test_an_alias_is_a_copy() -> None:
    """Or an override of the one place would change the other."""
    values = plain.load("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}")
    values["a"]["b"] = 5
    assert values == {"a": {"b": 5}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}


def circle() -> dict[str, Any]:
    values: dict[str, Any] = {"train": {"iterations": 1}}
    values["env"] = {"settings": values}
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"iterations": date(2026, 1, 1)}}, r"^train\.iterations: text, a number, .*got datetime\.date"),
        ({"reward": {"weights": {1: 1.0}}}, r"^reward\.weights: the key 1 is no text$"),
        ({"env": {"settings": {"a": [{2, 3}]}}}, r"^env\.settings\.a\.0: text, a number, .*got \{2, 3\}$"),
        ({"policy": {"field": Path("x")}}, r"^policy\.field: text, a number"),
        (
            {"env": {"settings": reduce(lambda inner, _: {"a": inner}, range(500), 1)}},
            r"^env\.settings.*: nested too deeply$",
        ),
        (circle(), r"^env\.settings: holds itself$"),
    ],
)
def test_values_from_python_are_plain_too(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(values)


@pytest.mark.parametrize("base", ["", "5", "[a]"])
def test_a_base_is_a_name(base: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"base: {base or repr('')}\n")
    with pytest.raises(ValueError, match=r"^base: in recipe .* write the name of a recipe"):
        recipes.read(str(tmp_path / "x.yaml"))
