"""Plain YAML values before they are checked: reading, overriding by path, merging a recipe into its base."""

from __future__ import annotations

from typing import Any

from rlflow.config import plain


def set_value(values: dict[str, Any], assignment: str) -> None:
    """Apply one 'a.b.c=value' override in place; the value is YAML. A component name may be deepened."""
    path, sep, text = assignment.partition("=")
    if not sep or not path:
        raise ValueError(f"override {assignment!r}: write section.key=value")
    *parents, last = path.split(".")
    node = values
    for part in parents:
        child = node.get(part)
        if isinstance(child, str):  # steps: window  ->  steps: {name: window, ...}
            child = {"name": child}
        elif child is None or isinstance(child, bool):  # train.wandb: true  ->  train.wandb: {project: ...}
            child = {}
        elif not isinstance(child, dict):
            raise ValueError(f"override {assignment!r}: {part!r} is a value, not a section")
        node[part] = child
        node = child
    node[last] = plain.load(text) if text else None


def read_yaml(text: str) -> dict[str, Any]:
    """A YAML mapping of plain values."""
    values = plain.load(text)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError("a recipe is a YAML mapping of sections")
    return values


WHOLE = ("reward.weights", "reward.settings", "eval.metrics")
"""Tables of names: another recipe's table is replaced, since its rewards would go on being asked for."""


NAMED_SECTIONS = ("env",)
"""Sections with a name inside: another name keeps the section's other keys, which are not that component's own."""


def merge(base: dict[str, Any], over: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Deep merge; a component with another name, or a table of names, replaces what was there."""
    out = dict(base)
    for key, value in over.items():
        mine, path = out.get(key), f"{prefix}{key}"
        if isinstance(mine, dict) and isinstance(value, dict) and path not in WHOLE:
            same = path in NAMED_SECTIONS or value.get("name") in (None, mine.get("name"))
            value = merge(mine, value, f"{path}.") if same else value
        out[key] = value
    return out
