"""Recipes: YAML files in configs/ (or the user's own), found by name and merged; nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rlflow.config import Config, merge, parse, read_yaml, set_value
from rlflow.registry import nearest


def _folder() -> Any:
    return resources.files("rlflow.configs")


def names() -> list[str]:
    """Names of all shipped recipes."""
    return sorted(f.name.removesuffix(".yaml") for f in _folder().iterdir() if f.name.endswith(".yaml"))


def read(name: str) -> dict[str, Any]:
    """The values of a recipe by name or .yaml path; `base: other` inherits from another one."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"no recipe file {name!r}")
        text = path.read_text(encoding="utf-8")
    elif name in names():
        text = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise ValueError(f"unknown recipe {name!r}{nearest(name, names())}")
    values = read_yaml(text)
    base = values.pop("base", None)
    return merge(read(base), values) if base else values


def load(name: str, overrides: Sequence[str] = (), trust_code: bool = False) -> Config:
    """A checked Config from a recipe and 'section.key=value' overrides."""
    values = read(name)
    for assignment in overrides:
        set_value(values, assignment)
    return parse(values, trust_code)
