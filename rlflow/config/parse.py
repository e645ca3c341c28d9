"""From values to a Config, checked completely before anything starts.

Unknown keys, wrong types and impossible combinations are errors that name the full path, the reason and the nearest
valid name.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlflow import registry
from rlflow.config.algorithms import LEARNERS, AlgorithmConfig, algorithm_name
from rlflow.config.former import refuse, translate
from rlflow.config.inputs import absolute
from rlflow.config.limits import check
from rlflow.config.plain import check_plain
from rlflow.config.schema import Config
from rlflow.config.values import merge
from rlflow.registry import nearest

MAY_CHANGE_ON_RESUME = (
    "about",
    "train.iterations",
    "train.minutes",
    "train.stop_when",
    "train.checkpoint_every",
    "train.keep",
    "train.tensorboard",
    "train.report",
    "train.wandb",
    "train.threads",
    "train.sharding",
    "eval.every",
    "eval.metrics",
    "eval.grid",
    "eval.rows_per_call",
    "algorithm.micro_batch",
    "env.rows_per_call",
    "env.settings.threads",
    "eval.video",
    "reward.settings.*.url",  # a server may have moved
    "reward.settings.*.device",
    "reward.settings.*.offload",
)


def _field_names(cls: type, path: Sequence[Any]) -> list[str]:
    """Valid keys of the section at `path`."""
    found: list[Any] = [cls]
    for part in path:
        if isinstance(part, int):  # of a list
            continue
        hints = [hint for c in found if (hint := typing.get_type_hints(c).get(part)) is not None]
        members = [m for hint in hints for m in typing.get_args(hint) or (hint,)]
        found = [m for m in members if dataclasses.is_dataclass(m)]
    return list(dict.fromkeys(f.name for c in found for f in dataclasses.fields(c)))


def _elsewhere(name: str) -> str:
    """'; did you mean train.seed?' where a section has the setting that was looked for at the top."""
    found = [f"{section}.{name}" for section in _field_names(Config, []) if name in _field_names(Config, [section])]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        loc = [part for part in item["loc"] if not str(part).endswith("]")]  # less the member of a union
        if loc[0] == "algorithm" and len(loc) > 2:
            loc.pop(1)  # less the algorithm's name
        loc = loc[:-1] if len(loc) > 1 and loc[-1] == "str" else loc
        path = ".".join(str(p) or "''" for p in loc)
        of_spec = item["loc"][-1] == "str" or str(item["loc"][-1]).startswith("dict[")  # the member of that union
        if item["type"] == "union_tag_invalid" and isinstance(item["input"], dict):
            name = algorithm_name(item["input"])
            lines.append(f"{path}.name: unknown algorithm {name!r}{nearest(name, registry.TABLE['algorithm'])}")
        elif of_spec and item["type"] in ("string_type", "dict_type"):
            lines.append(f"{path}: Input should be a name or {{name: ..., setting: ...}}, got {item['input']!r}")
        elif item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = _elsewhere(str(loc[0])) if len(loc) == 1 else ""
            lines.append(f"{path}: no such setting{known or nearest(str(loc[-1]), _field_names(Config, loc[:-1]))}")
        else:
            lines.append(f"{path}: {item['msg']}, got {item['input']!r}")
    return "\n".join(dict.fromkeys(lines))


OF_IMAGES: dict[str, Any] = {
    "reward": {"weights": {"shapes_soft": 0.5, "shapes_strict": 0.5}},
    "eval": {
        "metrics": {
            "strict": "shapes_strict",
            "soft": "shapes_soft",
            "judge": "cnn_judge",
            "diversity": "diversity",
            "base_distance": "base_distance",
        }
    },
}
"""Where a run makes images and names no others; a simulator has a reward of its own."""

UNNAMED: dict[str, Any] = {
    "likelihood": {"name": "chain"},
    "algorithm": {"name": "policy_gradient", "objective": {"name": "clip"}},
}
"""Components that a section without a name is of."""


@cache
def _schema() -> TypeAdapter[Config]:
    """Made once: it costs more than all else here."""
    return TypeAdapter(Config)


def parse(values: dict[str, Any], trust_code: bool = False) -> Config:
    """A checked Config with absolute paths; ValueError lists every problem with its full path."""
    check_plain(values)
    if isinstance(name := values.get("algorithm"), str):
        values = values | {"algorithm": {"name": name}}
    train = values.get("train")
    if isinstance(train, dict) and isinstance(on := train.get("wandb"), bool):
        values = values | {"train": train | {"wandb": {} if on else None}}
    if isinstance(train, dict) and isinstance(rule := train.get("stop_when"), dict):
        values = values | {"train": values["train"] | {"stop_when": [rule]}}
    values = merge(UNNAMED, values)
    if isinstance(algorithm := values["algorithm"], dict) and algorithm.get("name") == "policy_gradient":
        refuse(algorithm)
    env = values.get("env")
    if not isinstance(env, dict) or env.get("name", "prompt") == "prompt":
        values = merge(OF_IMAGES, values)
    try:
        config = _schema().validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None
    check(config, trust_code)
    return _schema().validate_json(json.dumps(absolute(config.to_dict())), strict=True)


COMPONENTS = {
    "policy.kernel": "kernel",
    "policy.solver": "solver",
    "policy.grid": "grid",
    "policy.guidance": "guidance",
    "env.frozen.steering": "steering",
    "steps": "steps",
    "likelihood": "likelihood",
    "advantage": "advantage",
    "algorithm.objective": "objective",
    "algorithm.chain.objective": "objective",
    "algorithm.through": "through",
    "imitation.ratio": "ratio",
    "eval.solver": "solver",
}
"""Paths of components, and their kinds."""


def _complete(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """With what components leave to their defaults written out, so that equal runs have equal values."""
    out = {}
    for key, value in values.items():
        kind = COMPONENTS.get(f"{prefix}{key}")
        inner = _complete(value, f"{prefix}{key}.") if isinstance(value, dict) and kind is None else value
        out[key] = inner if kind is None else registry.complete(kind, inner)
    return out


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Paths whose values differ between a saved config and one, leaving out those that may change on resume."""
    return _difference(_complete(saved(old)), _complete(saved(new)), "")


def saved(values: dict[str, Any]) -> dict[str, Any]:
    """The config of a saved run: today's spelling, absolute paths, and defaults for what its version did not have."""
    values = translate(values)
    learner = LEARNERS.get(algorithm_name(values.get("algorithm")), AlgorithmConfig)
    return absolute(merge(Config(algorithm=learner()).to_dict(), values))


def _difference(old: dict[str, Any], new: dict[str, Any], prefix: str) -> list[str]:
    found = []
    for key in {**old, **new}:
        path = f"{prefix}{key}"
        if any(fnmatchcase(path, pattern) for pattern in MAY_CHANGE_ON_RESUME):
            continue
        a, b = old.get(key), new.get(key)
        same = path not in COMPONENTS or (
            isinstance(a, dict) and isinstance(b, dict) and a.get("name") == b.get("name")
        )
        if isinstance(a, dict) and isinstance(b, dict) and same:
            found += _difference(a, b, f"{path}.")
        elif a != b:
            found.append(f"{path}: {a!r} -> {b!r}")
    return found
