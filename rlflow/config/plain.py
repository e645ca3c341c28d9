"""YAML text to plain values and back: mappings by text, lists, text, numbers, true, false and null, nothing else.

What PyYAML would read besides is refused with its line, since a later step would misread it: a key given twice, keys
that are no text, dates (they stay text), sets, bytes, tags, aliases that hold themselves or unfold without end.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

MOST_VALUES = 100_000
"""Of one text, aliases unfolded: a recipe has a hundred."""
MOST_DIGITS = 400
DEEPEST = 100
YAML = "tag:yaml.org,2002:"
PATTERNS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
    "int": r"[-+]?(0b[01_]+|0[0-7_]*|0x[0-9a-fA-F_]+|[1-9][0-9_]*)",
    "float": r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}
"""Of YAML 1.1 less dates and numbers to the base of 60 (1:30), and with 1e-4, which it reads as text."""


class NotPlainError(yaml.MarkedYAMLError):
    """YAML that holds more than plain values."""


def _refuse(node: yaml.Node, problem: str) -> NotPlainError:
    return NotPlainError(None, None, problem, node.start_mark)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str | None, Any] = {}  # noqa: RUF012 - PyYAML's own table, filled below

    def __init__(self, text: str):
        super().__init__(text)
        self.left, self.open = MOST_VALUES, set[int]()

    def plain(self, node: yaml.Node) -> Any:
        """The value of a node, every alias a copy of its own; NotPlainError with the place."""
        self.left -= 1
        if self.left < 0:
            raise _refuse(node, f"more than {MOST_VALUES:,} values, aliases unfolded")
        if id(node) in self.open:
            raise _refuse(node, "an alias that holds itself")
        self.open.add(id(node))
        self._check_tag(node)
        if isinstance(node, yaml.MappingNode):
            found: Any = self._mapping(node)
        elif isinstance(node, yaml.SequenceNode):
            found = [self.plain(item) for item in node.value]
        else:
            found = self._scalar(node)
        self.open.remove(id(node))
        return found

    def _check_tag(self, node: yaml.Node) -> None:
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        implied = self.resolve(type(node), text, (getattr(node, "style", None) is None, True))
        if node.tag not in (implied, f"{YAML}str"):
            kind = node.tag.replace(YAML, "!!")
            raise _refuse(node, f"a tag {kind}: only text, numbers, lists and mappings are read, without a tag")

    def _scalar(self, node: yaml.Node) -> Any:
        if node.tag in (f"{YAML}int", f"{YAML}float"):
            if len(node.value) > MOST_DIGITS:
                raise _refuse(node, f"a number of {len(node.value)} characters")
            if "e" in node.value.lower() and "x" not in node.value:  # 1e3 is a whole one
                number = float(node.value.replace("_", ""))
                return int(number) if number.is_integer() else number
        return node.value if node.tag == f"{YAML}merge" else self.construct_object(node)

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag not in (f"{YAML}str", f"{YAML}merge"):
                raise _refuse(key, f"the key {_shown(key)} is no text: write it in quotes, if it is meant")
            if key.value in seen:
                raise _refuse(key, f"the key {key.value!r} stands twice in one mapping")
            if id(value) in self.open:
                raise _refuse(key, "an alias that holds itself")
            seen.add(key.value)
        self.flatten_mapping(node)
        return {key.value: self.plain(value) for key, value in node.value}


class _Dumper(yaml.SafeDumper):
    """Quotes a text wherever our reader, or PyYAML's own, would take it for something else."""


for _name, _pattern in PATTERNS.items():
    _Loader.add_implicit_resolver(f"{YAML}{_name}", re.compile(f"^(?:{_pattern})$"), None)
_Dumper.add_implicit_resolver(f"{YAML}float", re.compile(f"^(?:{PATTERNS['float']})$"), list("-+.0123456789"))


def _shown(key: yaml.Node) -> str:
    return repr(key.value) if isinstance(key, yaml.ScalarNode) else "of several parts"


def load(text: str) -> Any:
    """The plain value of a YAML text, a new one each time; yaml.YAMLError with its place."""
    try:
        return copy.deepcopy(_read(text))
    except RecursionError:
        raise NotPlainError(problem="nested too deeply") from None


@functools.lru_cache(512)
def _read(text: str) -> Any:
    """Once: recipes share their bases, and runs their overrides."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else loader.plain(node)
    finally:
        loader.dispose()


def dump(values: dict[str, Any]) -> str:
    """YAML that `load` reads back as it was."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False)
    return text


@contextmanager
def yaml_errors(what: str) -> Iterator[None]:
    """Say in one line, as ValueError, where `what` is not YAML, or not plain."""
    try:
        yield
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        if isinstance(error, NotPlainError):
            raise ValueError(f"{what}{where and ', '}{where}: {problem}") from None
        raise ValueError(f"{what} is not YAML{where and ' in '}{where}: {problem}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is no text in UTF-8: {error.reason} at byte {error.start}") from None


def check_plain(value: Any, path: str = "", inside: tuple[int, ...] = ()) -> None:
    """ValueError with the path of a value that a YAML file could not hold, or of a container that holds itself."""
    if isinstance(value, str | int | float | None):
        return
    if id(value) in inside or len(inside) > DEEPEST:
        raise ValueError(f"{path[:80]}: {'holds itself' if id(value) in inside else 'nested too deeply'}")
    inside = (*inside, id(value))
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{path or 'config'}: the key {key!r} is no text")
            check_plain(item, f"{path}.{key}" if path else key, inside)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_plain(item, f"{path}.{index}", inside)
    else:
        raise ValueError(f"{path}: text, a number, a list or a mapping is expected, got {value!r}")
