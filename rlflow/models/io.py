"""Networks on disk: a folder with model.safetensors and config.json; no pickle, no code from a checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from rlflow import registry
from rlflow.files import read_tensors, save_tensors
from rlflow.flow.field import VelocityField

WEIGHTS = "model.safetensors"
HERE = "THIS_FOLDER"
"""Among the args of a config.json: the folder that holds it, wherever that is by now."""


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """ValueError that names the first tensor of `where` with a value that is not finite."""
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{where}: {name!r} has values that are not finite")


def embedded() -> list[str]:
    """Names of the checkpoints shipped inside the package."""
    root = resources.files("rlflow") / "assets"
    known = registry.TABLE["policy"]
    return sorted(f.name for f in root.iterdir() if f.name in known and (f / "config.json").is_file())


def folder_of(name: str) -> Path:
    """The folder of an embedded checkpoint's name or of a path."""
    if name in embedded():
        return Path(str(resources.files("rlflow") / "assets" / name))
    path = Path(name)
    if not (path / "config.json").is_file():
        raise ValueError(f"no checkpoint {name!r}: give a folder with config.json, or one of {embedded()}")
    return path


def read_config(name: str) -> dict[str, Any]:
    """config.json: {"model", "args", "made_by", "judged_by"}."""
    folder = folder_of(name)
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if "args" in config:
        config["args"] = {k: str(folder) if v == HERE else v for k, v in config["args"].items()}
    return config


def load_field(name: str, trust_code: bool = False) -> VelocityField:
    """The network of an embedded checkpoint or a folder; a model class outside rlflow needs trust."""
    config, folder = read_config(name), folder_of(name)
    if missing := {"model", "args"} - set(config):
        raise ValueError(f"{folder / 'config.json'} lacks {sorted(missing)}: save_field writes them")
    model = registry.find("model", config["model"], trust_code)
    try:
        field: VelocityField = model(**config["args"])
        _load_weights(field, folder)
    except (TypeError, RuntimeError) as error:
        why = " ".join(" ".join(str(error).splitlines()[:2]).split())  # torch lists every tensor, a line each
        raise ValueError(f"checkpoint {name!r} is not one of {config['model']}: {why}") from error
    return field


def save_field(
    field: VelocityField,
    folder: Path | str,
    made_by: dict[str, Any] | None = None,
    judged_by: dict[str, Any] | None = None,
) -> Path:
    """Write a folder that `load_field` reads; `judged_by` are the sections of a config that evaluate it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = field.builder or f"{_module(type(field))}:{type(field).__qualname__}"
    name = next((n for n, known in registry.TABLE["model"].items() if known == path), path)
    _save_weights(field, folder)
    config = {"model": name, "args": field.args, "made_by": made_by or {}, "judged_by": judged_by or {}}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return folder


def _save_weights(field: VelocityField, folder: Path) -> None:
    if field.own_format:
        field.save_weights(folder)
    else:
        state = {k: v.contiguous() for k, v in field.state_dict().items()}
        check_finite(state, f"{folder / WEIGHTS} was not written")
        save_tensors(state, folder / WEIGHTS)


def _load_weights(field: VelocityField, folder: Path) -> None:
    if field.own_format:
        field.load_weights(folder)
    else:
        state = read_tensors(folder / WEIGHTS)
        check_finite(state, str(folder / WEIGHTS))
        field.load_state_dict(state)


def _module(cls: type) -> str:
    """Where a class can be imported from: also when its file is the script that runs."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return Path(file).stem if cls.__module__ == "__main__" and file else cls.__module__
