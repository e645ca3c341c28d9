"""Components by kind and name: found, checked and built. The names that ship are in components.py.

A component is any typed callable. Its parameters are its settings; `build` fills the ones the caller
supplies (the policy, an event shape) and validates the rest. Code outside the package is named by a
dotted path, "my_package.rewards:sharpness".
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rlflow import ranges
from rlflow.components import MAKES
from rlflow.components import TABLE as TABLE
from rlflow.trust import IMPORTS_NAMES, UntrustedCodeError, check_texts, check_trusted

FOREIGN: dict[tuple[str, str], str] = {}
"""Components outside rlflow that were found so far, by kind and name, with their files: an error in one names it."""

GIVEN: dict[str, Callable[..., Any]] = {}
"""Components handed over in Python, by the name that stands for them in a config; who gives code trusts it."""
GIVEN_PREFIX = "given:"
"""Begins the name of one that no module holds."""


class SettingError(ValueError):
    """A component's own setting is wrong: `located` joins its name to the component's path."""

    def __init__(self, setting: str, message: str):
        super().__init__(f"{setting}: {message}")


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' or the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def give(component: Callable[..., Any]) -> str:
    """Take a function or class, and return the name by which `find` knows it in this process from now on.

    That of the table, or its dotted path, or given:NAME where it cannot be imported.
    """
    if not (inspect.isfunction(component) or inspect.isclass(component)):
        raise ValueError(
            f"{component!r} has no name that could stand in a config: give a function, or a class "
            "with its settings as {'name': TheClass, 'setting': ...}"
        )
    if not component.__name__.isidentifier():
        raise ValueError("a lambda has no name that could stand in a config: give a function made by def")
    path = f"{component.__module__}:{component.__qualname__}"
    name = path if _can_be_imported(component) else f"{GIVEN_PREFIX}{component.__name__}"
    for table in TABLE.values():
        if name in table.values():
            return next(known for known, place in table.items() if place == name)
    GIVEN[name] = component
    return name


def _can_be_imported(component: Callable[..., Any]) -> bool:
    """True where another process finds this very component by its dotted path."""
    module = sys.modules.get(component.__module__)
    return component.__module__ != "__main__" and getattr(module, component.__qualname__, None) is component


def must_be_given(name: str) -> bool:
    """True for what was given in another process, and lies in no module."""
    return name.startswith(GIVEN_PREFIX) and name not in GIVEN


def find(kind: str, name: str, trust_code: bool = False) -> Callable[..., Any]:
    """The component of a registered name, or of a dotted path when code is trusted."""
    if name in GIVEN:
        return GIVEN[name]
    path = TABLE[kind].get(name)
    if path is None:
        if must_be_given(name):
            raise ValueError(
                f"{kind} {name!r} was given in Python and lies in no module: give rf.Trainer the same function again, "
                "or put it into a module and name its dotted path"
            )
        if ":" not in name:
            raise ValueError(f"unknown {kind} {name!r}{nearest(name, TABLE[kind])}")
        check_trusted(f"{kind} {name!r} is code outside rlflow", trust_code)
        path = name
    module, _, attribute = path.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{kind} {name!r} cannot be imported: {error}") from error
    if name not in TABLE[kind]:
        FOREIGN[kind, name] = str(getattr(found, "__file__", ""))  # a built-in module has none
    try:
        return getattr(found, attribute)
    except AttributeError:
        raise ValueError(f"{kind} {name!r}: module {module} has no {attribute!r}") from None


@contextmanager
def located(path: str) -> Iterator[None]:
    """Put the path of a setting before the message of any ValueError inside, unless it stands there already."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith((f"{path}: ", f"{path}.")):
            raise
        kind = UntrustedCodeError if isinstance(error, UntrustedCodeError) else ValueError
        raise kind(f"{path}{'.' if isinstance(error, SettingError) else ': '}{error}") from error


def imported(path: str) -> Any:
    """What "module:attribute" names; ValueError. Whoever calls it has seen to trust."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}; write module:function") from error


def split_spec(kind: str, spec: Any) -> tuple[str, dict[str, Any]]:
    """'name' or {'name': ..., setting: ...} to (name, settings)."""
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise ValueError(f"{kind}: write a name, or name: ... with its settings, got {spec!r}")
    return spec["name"], {k: v for k, v in spec.items() if k != "name"}


def settings(component: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a component, with annotations resolved to types."""
    known = inspect.isclass(component) or inspect.isfunction(component)  # what else can be called may have no hash
    return dict(_settings(component) if known else _settings.__wrapped__(component))


@functools.lru_cache(512)
def _settings(component: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    target = component.__init__ if inspect.isclass(component) else component
    hints = typing.get_type_hints(target, include_extras=True)
    found = inspect.signature(component).parameters
    return {n: p.replace(annotation=hints.get(n, Any)) for n, p in found.items()}


def complete(kind: str, spec: Any) -> Any:
    """`spec` with the defaults of a registered component written out; others, and no component, as they are."""
    name, given = split_spec(kind, spec) if isinstance(spec, str | Mapping) and spec else ("", {})
    if name not in TABLE[kind]:
        return spec
    parameters = settings(find(kind, name)).items()
    return {"name": name} | {n: p.default for n, p in parameters if p.default is not p.empty} | given


def validate(kind: str, path: str, spec: Any, supplied: Iterable[str] = (), trust_code: bool = False) -> dict[str, Any]:
    """Settings of `spec`, types and ranges checked; ValueError names the full path and the nearest valid name.

    `supplied` are parameters the program fills and a config may not set.
    """
    import pydantic

    name, given = split_spec(path, spec)
    with located(path):
        parameters = settings(find(kind, name, trust_code))
    allowed = {n: p for n, p in parameters.items() if n not in set(supplied)}
    for key in given:
        if key not in allowed:
            raise ValueError(f"{path}.{key}: {name} has no such setting{nearest(key, allowed)}")
    checked = {}
    for key, p in allowed.items():
        if key not in given:
            if p.default is p.empty:
                raise ValueError(f"{path}.{key}: {name} needs this setting")
            continue
        try:
            checked[key] = ranges.adapter(p.annotation).validate_json(json.dumps(given[key]), strict=True)
        except (pydantic.ValidationError, TypeError) as error:
            raise ValueError(f"{path}.{key}: {_reason(error)}, got {given[key]!r}") from None
        ranges.check(f"{path}.{key}", p.annotation, checked[key])
        if kind in IMPORTS_NAMES:
            with located(f"{path}.{key}"):
                check_texts(given[key], trust_code)
    return checked


def _reason(error: Exception) -> str:
    import pydantic

    if not isinstance(error, pydantic.ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where + ': ' if where else ''}{first['msg']}"


def build(kind: str, path: str, spec: Any, supplied: Mapping[str, Any] | None = None, trust_code: bool = False) -> Any:
    """Make the component of `spec`; `supplied` values are passed where the component names them."""
    supplied = supplied or {}
    name, _ = split_spec(path, spec)
    checked = validate(kind, path, spec, supplied, trust_code)
    component = find(kind, name, trust_code)
    mine = {k: v for k, v in supplied.items() if k in settings(component)}
    with located(path):
        if missing := sorted(getattr(component, "__abstractmethods__", ())):
            raise ValueError(f"{name} does not define {', '.join(missing)}")
        made = component(**checked, **mine)
        if name not in TABLE[kind]:
            _check_contract(kind, name, made)
        return made


def _check_contract(kind: str, name: str, made: Any) -> None:
    """ValueError for a component from outside that is not what its kind is."""
    if kind not in MAKES:
        return
    module, _, base = MAKES[kind].partition(":")
    if not isinstance(made, getattr(importlib.import_module(module), base)):
        raise ValueError(f"{name} made a {type(made).__name__}, which is no {base}: derive it from {module}.{base}")
