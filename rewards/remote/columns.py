"""Which columns a served reward reads, and whether what came can be they: its own annotations say of what type each is.

    def ocr(images: Tensor, text: Sequence[str])        `text` must be a list of strings, `images` a tensor

A column without an annotation may be anything.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import pydantic
from torch import Tensor

from rlflow.rewards.component import column_names


def types_of(fn: Callable[..., Any]) -> dict[str, Any]:
    """Types by parameter, as far as they can be had, of a function, a partial one, or a class's `__call__`."""
    target = fn.func if isinstance(fn, functools.partial) else fn
    try:
        return typing.get_type_hints(target if inspect.isroutine(target) else type(target).__call__)
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers alone, builtins
        return {}


class Expected:
    """The columns of a reward with their types."""

    def __init__(self, fn: Callable[..., Any]):
        self.names, types = column_names(fn), types_of(fn)
        self._lists: dict[str, pydantic.TypeAdapter[Any]] = {}
        self._tensors = [name for name in self.names if types.get(name) is Tensor]
        for name in set(self.names) & set(types) - set(self._tensors):
            try:
                self._lists[name] = pydantic.TypeAdapter(types[name])
            except pydantic.errors.PydanticUserError:  # a type of its own
                continue

    def check(self, columns: Mapping[str, Any]) -> None:
        """ValueError that names a column which is missing, or no column of its type."""
        if lacking := [name for name in self.names if name not in columns]:
            raise ValueError(f"the reward reads {list(self.names)}, the request lacks {lacking}")
        for name in self._tensors:
            if not isinstance(columns[name], Tensor):
                raise ValueError(f"column {name!r} must be a tensor")
        for name, adapter in self._lists.items():
            try:
                adapter.validate_python(columns[name], strict=True)
            except pydantic.ValidationError as error:
                first = error.errors()[0]
                where = "".join(f"[{part!r}]" for part in first["loc"])
                raise ValueError(f"column {name!r}{where}: {first['msg']}") from None
