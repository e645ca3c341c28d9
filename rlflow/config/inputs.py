"""The files and folders that a config names: absolute from the start, known by hash, and kept where they are small.

RUN/inputs/inputs.json says of each, by its setting, where it lay and what it held when the run began; prompt files lie
beside it. So a run goes on, and is evaluated, from any folder, and notices where something was replaced.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlflow.envs.captions.files import READERS
from rlflow.files import digest, write_text
from rlflow.registry import TABLE

PROMPTS = ("env.prompts", "eval.prompts")
FOLDERS = ("algorithm.offline.demos", "imitation.demos", "policy.select.scorer.run")
"""Settings that are a folder whatever they say."""
NETWORKS = ("policy.field", "env.frozen.policy")
SECTIONS = (*NETWORKS, "env.settings", "reward.settings")
"""Of components, in whose settings a text is a file or folder if there is one of that name."""
MARKS = ("config.json", "model_index.json", "adapter_config.json", "dataset.json")
"""What a folder of weights or data holds."""
SMALL = 32 * 2**20
"""Bytes up to which a prompt file is copied into the run."""

Record = dict[str, dict[str, str]]
"""By setting: "path", "sha256" and, where the run has one, the name of its "copy"."""


def absolute(values: dict[str, Any]) -> dict[str, Any]:
    """A config's plain values with absolute paths."""
    return _replaced(values, lambda setting, text, path: text.removesuffix(path) + os.path.abspath(path), _path)


def named(values: dict[str, Any]) -> dict[str, Path]:
    """The files and folders by setting."""
    found: dict[str, Path] = {}

    def note(setting: str, text: str, path: str) -> str:
        found[setting] = Path(path)
        return text

    _replaced(values, note, _path)
    return found


def keep(run: Path, values: dict[str, Any]) -> None:
    """Note what a run begins with; what it noted before stays."""
    folder, record = run / "inputs", _read(run)
    for setting, path in named(values).items():
        if setting in record or not path.exists() or (path.is_dir() and not _of_weights_or_data(path)):
            continue
        folder.mkdir(exist_ok=True)
        record[setting] = {"path": str(path), "sha256": digest(path)}
        if setting in PROMPTS and path.stat().st_size <= SMALL:
            record[setting]["copy"] = f"{setting}{path.suffix}"
            shutil.copyfile(path, folder / record[setting]["copy"])
    if record:
        write_text(folder / "inputs.json", json.dumps(record, indent=1) + "\n")


def forget(run: Path) -> None:
    """Remove what a run that never trained had noted."""
    shutil.rmtree(run / "inputs", ignore_errors=True)


def at_hand(run: Path, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values with the run's own copy in place of every file that is gone or was changed, and what was changed."""
    record, changed = _read(run), []

    def noted(setting: str, text: str) -> str | None:
        path = record.get(setting, {}).get("path")
        return path if path and text.endswith(path) else None

    def find(setting: str, text: str, path: str) -> str:
        mine = record[setting]
        copy = run / "inputs" / Path(mine["copy"]).name if "copy" in mine else None
        what = _changed(mine, Path(path))
        if what is None:
            return text
        if copy is None or not copy.is_file():
            changed.append(f"{setting}: {path} {what}")
            return text
        if Path(path).exists():
            changed.append(f"{setting}: {path} {what}; the run's own copy {copy} is used")
        return text.removesuffix(path) + os.path.abspath(copy)

    return _replaced(values, find, noted), changed


def changed_for_good(run: Path, values: dict[str, Any]) -> list[str]:
    """What is not as it was when the run began, and was not kept."""
    return [line for line in at_hand(run, values)[1] if "own copy" not in line]


def _changed(record: dict[str, str], path: Path) -> str | None:
    """What happened to an input since it was noted; None for nothing."""
    if not path.exists():
        return "is gone since the run began"
    return None if digest(path) == record.get("sha256") else "is not what it was when the run began"


def _read(run: Path) -> Record:
    path = run / "inputs" / "inputs.json"
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    entries = list(record.values()) if isinstance(record, dict) else [None]
    if not all(isinstance(entry, dict) and all(isinstance(v, str) for v in entry.values()) for entry in entries):
        raise ValueError(f"{path} is no table of inputs by setting")
    return record


Change = Callable[[str, str, str], str]
"""(setting, its text, the path at the end of it) -> the text to put there."""
PathIn = Callable[[str, str], str | None]
"""(setting, its text) -> the path at the end of it."""


def _replaced(value: Any, change: Change, path_in: PathIn, setting: str = "") -> Any:
    """A copy of nested values with `change` applied to every text in which there is a path."""
    if isinstance(value, dict):
        return {k: _replaced(v, change, path_in, f"{setting}.{k}" if setting else str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_replaced(v, change, path_in, f"{setting}.{i}") for i, v in enumerate(value)]
    path = path_in(setting, value) if isinstance(value, str) else None
    return value if path is None else change(setting, value, path)


def _path(setting: str, text: str) -> str | None:
    """The path in a setting's text; None where it names no file or folder."""
    if setting in PROMPTS:
        path = text.partition(":")[2] if text.startswith("geneval:") else text
        return path if Path(path).suffix in READERS else None
    if setting in FOLDERS:
        return text
    if not setting.startswith(SECTIONS) or setting.endswith(".name"):
        return None
    if setting in NETWORKS and (text in TABLE["policy"] or text in TABLE["model"]):
        return None
    return text if _exists(text) else None


def _of_weights_or_data(folder: Path) -> bool:
    """Any other folder, which may be the whole disk, is not read through."""
    return any((folder / mark).is_file() for mark in MARKS) or any(folder.glob("*.safetensors"))


def _exists(text: str) -> bool:
    """Whether a text is a path of this disk; a bare word only if it is a folder of weights or data."""
    path = Path(text)
    try:
        if path.is_dir():
            return os.sep in text or _of_weights_or_data(path)
        return bool(path.suffix or os.sep in text) and path.is_file()
    except (OSError, ValueError):  # longer than a name can be, or holding a null byte
        return False
