"""Functions and classes in a config made in Python: each is handed to the registry, and its name takes its place.

    {"base": "t2i_flow_grpo_fast", "reward": {"weights": {darkness: 1.0}}}   ->   {"my_rewards:darkness": 1.0}

So a config stays plain values. What can be imported is named by its dotted path: any process can resume the run.
What cannot (a notebook's function) is named given:NAME, and the run resumes only where it is given again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from rlflow import registry


def name_components(values: Mapping[Any, Any]) -> dict[str, Any]:
    """A copy in which names stand for functions and classes; ValueError says where one cannot be named."""
    given: dict[str, Callable[..., Any]] = {}
    named: dict[str, Any] = _named(values, "", given)
    for name in given:
        if name.startswith(registry.GIVEN_PREFIX):
            warnings.warn(
                f"{name.removeprefix(registry.GIVEN_PREFIX)} lies in no module that can be imported: the run resumes "
                "only where it is given again",
                stacklevel=5,
            )
    return named


def _named(value: Any, path: str, given: dict[str, Callable[..., Any]]) -> Any:
    if isinstance(value, Mapping):
        return {_key(k, path, given): _named(v, f"{path}.{k}".lstrip("."), given) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_named(item, path, given) for item in value]
    return _name(value, path, given) if callable(value) else value


def _key(key: Any, path: str, given: dict[str, Callable[..., Any]]) -> Any:
    return _name(key, path, given) if callable(key) else key


def _name(component: Callable[..., Any], path: str, given: dict[str, Callable[..., Any]]) -> str:
    with registry.located(path):
        name = registry.give(component)
        if given.setdefault(name, component) is not component:
            raise ValueError(f"two components are called {name!r}: rename one")
    return name
