"""What a setting may be, said in the annotations of signatures and checked in one place.

    def __init__(self, width: Size = 64, eta: Positive = 0.3, folder: str = "demos"): ...

What says nothing is checked all the same: a float is finite and at most 1e30 in size, an int has 63 bits, a text is not
empty. The insides of `Any` belong to somebody else.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

LARGEST = 1e30
"""Of a number anywhere: its products with a few others still fit float32."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, an end left out where it is open; `endless` allows inf, which means no limit."""

    says: str = "must be finite"
    low: float = -LARGEST
    high: float = LARGEST
    open_low: bool = False
    open_high: bool = False
    endless: bool = False

    def problem(self, number: float) -> str | None:
        """What is wrong with a number; None where nothing is. An int may have any number of digits."""
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        if (above and below) or (self.endless and number == math.inf):
            return None
        if number != number or self.says.startswith("must be in ") or (not above and self.low > -LARGEST):
            return self.says
        return "must be finite" if number in (math.inf, -math.inf) else f"must be at most {_shown(self.high)}"


@dataclass(frozen=True)
class MayBeEmpty:
    """Of a text that is no name and no path."""


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else str(number).replace("+", "")


POSITIVE = Range("must be positive", 0, open_low=True)
UNIT = Range("must be in [0, 1]", 0, 1)

Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, Range("must not be negative", 0)]
Limit = Annotated[float, dataclasses.replace(POSITIVE, endless=True)]
"""Positive; inf sets no limit."""
LimitOrZero = Annotated[float, Range("must not be negative", 0, endless=True)]
"""Not negative; 0 and inf set no limit."""
Level = Annotated[float, Range("must be positive", 0, 1000, open_low=True)]
"""Of noise, whose unit is the data's spread."""
Scale = Annotated[float, Range("must be in [0, 1000]", 0, 1000)]
"""Of guidance; published ones are below 30."""
Unit = Annotated[float, UNIT]
Share = Annotated[float, POSITIVE, UNIT]
BelowOne = Annotated[float, Range("must be in [0, 1)", 0, 1, open_high=True)]
LearningRate = Annotated[float, Range("must be in (0, 1]", 0, 1, open_low=True)]
"""Adam's first step is lr long in every weight: above 1 nothing of the network is left."""
Seconds = Annotated[float, Range("must be at least 0.001", 0.001, endless=True)]
Timeout = Annotated[float, Range("must be at least 0.001", 0.001)]

Count = Annotated[int, Range("must be positive", 1, 10**9)]
Natural = Annotated[int, Range("must not be negative", 0, 10**9)]
Size = Annotated[int, Range("must be positive", 1, 65_536)]
"""Of a layer, a picture, a chunk; a number of layers."""
Threads = Annotated[int, Range("must not be negative", 0, 1024)]
"""0: as many as there are CPUs."""
Seed = Annotated[int, Range("must be in [0, 2**63)", 0, 2**63, open_high=True)]
Port = Annotated[int, Range("must be in [0, 65535]", 0, 65_535)]
Text = Annotated[str, MayBeEmpty()]
Spec = str | dict[str, Any]
"""A component: its name, or `name: ...` with its settings."""

STRICT = {"extra": "forbid", "strict": True}
"""`__pydantic_config__` of a section: no unknown key, no value of another type."""

FINITE = Range()
WHOLE = Range(low=-(2**63), high=2**63 - 1)


def check(path: str, annotation: Any, value: Any) -> None:
    """ValueError with the path of a number out of its range, or of an empty name; sections are looked into."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        for name in (f.name for f in dataclasses.fields(value)):
            check(f"{path}.{name}" if path else name, hints[name], getattr(value, name))
        return
    if annotation is Any:
        return
    said = list(_metadata(annotation))
    for place, item in _items(path, value, inside=Any not in said):
        if (problem := _problem(said, item)) is not None:
            raise ValueError(f"{place}: {problem}")


@cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section, include_extras=True)


def argument(annotation: Any) -> Callable[[str], Any]:
    """The `type` of an argument on a command line, from the annotation of a setting."""
    plain = (*typing.get_args(annotation), annotation)[0]

    def read(text: str) -> Any:
        try:
            value = plain(text)
        except ValueError:
            raise ArgumentTypeError(f"must be a {'whole ' if plain is int else ''}number, got {text!r}") from None
        if (problem := _problem(list(_metadata(annotation)), value)) is not None:
            raise ArgumentTypeError(problem)
        return value

    return read


filled = argument(str)
"""A name or a path: `--run=` would mean the folder where the command stands."""


def _problem(said: list[Any], item: float | str) -> str | None:
    """What is wrong with a number or a text under the annotations `said`."""
    if isinstance(item, str):
        empty = not item.strip() and MayBeEmpty() not in said
        return "must not be empty: leave it out, or name one" if empty else None
    for limit in [m for m in said if isinstance(m, Range)] or [FINITE if isinstance(item, float) else WHOLE]:
        if (problem := limit.problem(item)) is not None:
            return f"{problem}, got {item}"
    return None


def _metadata(annotation: Any) -> Iterator[Any]:
    """What an annotation says anywhere in it; Any where some of it is open."""
    if annotation is Any or isinstance(annotation, Range | MayBeEmpty):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _metadata(part)


def _items(path: str, value: Any, inside: bool) -> Iterator[tuple[str, float | str]]:
    """Numbers and texts with their paths; those of mappings and lists if `inside`."""
    if isinstance(value, dict) and inside:
        for key, item in value.items():
            yield path, key
            yield from _items(f"{path}.{key}", item, inside)
    elif isinstance(value, list | tuple) and inside:
        for item in value:
            if dataclasses.is_dataclass(item):
                check(path, type(item), item)
            else:
                yield from _items(path, item, inside)
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        yield path, value


def adapter(annotation: Any) -> Any:
    """pydantic's TypeAdapter of a type; made once where the type has a hash, for making it costs more than a check."""
    try:
        return _adapter(annotation)
    except TypeError:
        return _adapter.__wrapped__(annotation)


@cache
def _adapter(annotation: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(annotation)
