"""Recipes: YAML files in configs/ (or the user's own), found by name and merged; nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from rlflow.config.given import name_components
from rlflow.config.parse import parse
from rlflow.config.plain import yaml_errors
from rlflow.config.schema import Config
from rlflow.config.values import merge, read_yaml, set_value
from rlflow.envs.captions.files import read_text
from rlflow.registry import located, nearest


def _folder() -> Any:
    return resources.files("rlflow.configs")


def names() -> list[str]:
    """Names of all shipped recipes."""
    return sorted(f.name.removesuffix(".yaml") for f in _folder().iterdir() if f.name.endswith(".yaml"))


def tables() -> dict[str, Any]:
    """The sweep tables that ship, by name: files whose first line is a comment that says what they are."""
    found = (f for f in (_folder() / "tables").iterdir() if f.name.endswith(".yaml"))
    return {f.name.removesuffix(".yaml"): f for f in sorted(found, key=lambda f: f.name)}


def read(name: str) -> dict[str, Any]:
    """The values of a recipe by name or .yaml path; `base: other` inherits from another one.

    A path in `base` starts from the folder of the recipe that says so.
    """
    return _read(name, ())


def _read(name: str, heirs: tuple[str, ...]) -> dict[str, Any]:
    key = str(Path(name).resolve()) if _is_path(name) else name
    if key in heirs:
        raise ValueError(f"recipe {name!r} inherits from itself: {' -> '.join([*heirs, key])}")
    with yaml_errors(f"recipe {name!r}"):
        values = read_yaml(_text(name))
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or not base:
        raise ValueError(f"base: in recipe {name!r} write the name of a recipe, or of a .yaml file, got {base!r}")
    if _is_path(base) and _is_path(name):
        base = str(Path(name).parent / base)
    return merge(_read(base, (*heirs, key)), values)


def _is_path(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _text(name: str) -> str:
    if _is_path(name):
        if not Path(name).is_file():
            raise ValueError(f"no recipe file {name!r}")
        with located(f"recipe {name!r}"):
            return read_text(Path(name))
    if name not in names():
        raise ValueError(f"unknown recipe {name!r}{nearest(name, names())}")
    return str((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))


def _read_values(config: Mapping[str, Any] | Config) -> dict[str, Any]:
    values = name_components(asdict(config) if isinstance(config, Config) else config)
    base = values.pop("base", None)
    return merge(read(str(base)), values) if base else values


def apply(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply 'section.key=value' overrides in place."""
    for assignment in overrides:
        with yaml_errors(f"override {assignment!r}"):
            set_value(values, assignment)


def load(config: str | Mapping[str, Any] | Config, overrides: Sequence[str] = (), trust_code: bool = False) -> Config:
    """A checked Config from a recipe, or its values, and 'section.key=value' overrides.

    Values may have a `base`, and functions and classes where a component is named.
    """
    values = read(config) if isinstance(config, str) else _read_values(config)
    apply(values, overrides)
    return parse(values, trust_code)
