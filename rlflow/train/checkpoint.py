"""Checkpoints: atomic folders of safetensors and JSON; complete enough for a bitwise resume; no pickle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE, TENSORS = "state.json", "state.safetensors"


def pack(tree: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split a tree of dicts, lists, tensors and JSON values into (tensors by path, JSON with references)."""
    if isinstance(tree, Tensor):
        # a copy: safetensors refuses tensors that share memory
        return {prefix: tree.detach().cpu().contiguous().clone()}, {"$tensor": prefix}
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        tensors: dict[str, Tensor] = {}
        values = {}
        for key, value in items:
            found, values[str(key)] = pack(value, f"{prefix}/{key}" if prefix else str(key))
            tensors |= found
        return tensors, values if isinstance(tree, dict) else {"$list": list(values.values())}
    return {}, tree


def unpack(tensors: dict[str, Tensor], value: Any) -> Any:
    """Inverse of `pack` (tuples come back as lists)."""
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$list" in value:
        return [unpack(tensors, v) for v in value["$list"]]
    return {k: unpack(tensors, v) for k, v in value.items()}


def rng_state() -> dict[str, Any]:
    """Global generators (training itself uses keyed ones only)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of `rng_state`; a state of another device type is left alone."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


class Checkpoints:
    """The folder RUN/checkpoints: NNNNNN/ per saved iteration, links `last` and `best`, at most `keep` others."""

    def __init__(self, run: Path, keep: int = 3):
        self.folder, self.keep = run / "checkpoints", keep

    def save(self, iteration: int, state: dict[str, Any], score: float | None = None) -> Path:
        """Write state of `iteration` completely or not at all; `score` (higher is better) may move `best`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        final = self.folder / f"{iteration:06d}"
        if (final / STATE).is_file():  # this iteration is on disk already
            return final
        work = self.folder / f".writing-{final.name}"
        work.mkdir()
        tensors, values = pack(state)
        try:
            save_file(tensors, work / TENSORS)
            (work / STATE).write_text(json.dumps({"iteration": iteration, "score": score, "state": values}))
            for name in (TENSORS, STATE):
                _sync(work / name)
        except OSError as error:
            shutil.rmtree(work, ignore_errors=True)
            raise OSError(
                f"could not write the checkpoint of iteration {iteration} ({error}): free some space; "
                "earlier checkpoints are intact and --resume last continues from them"
            ) from error
        os.replace(work, final)
        _sync(self.folder)
        self._link("last", final.name)
        if score is not None and (self.best_score() is None or score > self.best_score()):
            self._link("best", final.name)
        self._prune()
        return final

    def load(self, which: str | Path = "last") -> tuple[int, dict[str, Any]]:
        """(iteration, state) of 'last', 'best', an iteration number or a path."""
        path = self.path(which)
        head = json.loads((path / STATE).read_text())
        return head["iteration"], unpack(load_file(path / TENSORS), head["state"])

    def cut(self, iteration: int) -> None:
        """Forget checkpoints after `iteration`, when a run goes on from an earlier one."""
        for path in self.all():
            if int(path.name) > iteration:
                shutil.rmtree(path)
        kept = self.all()
        for name in ("last", "best"):
            link = self.folder / name
            if link.is_symlink() and not (link / STATE).is_file():
                link.unlink()
                if kept:
                    self._link(name, kept[-1].name)

    def path(self, which: str | Path = "last") -> Path:
        """The folder of a checkpoint; ValueError names what exists."""
        name = f"{int(which):06d}" if str(which).isdigit() else str(which)
        for path in (self.folder / name, Path(which)):
            if (path / STATE).is_file():
                return path
        known = [p.name for p in self.all()]
        raise ValueError(f"no checkpoint {str(which)!r} in {self.folder}: there are {known or 'none'}")

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if p.name.isdigit() and (p / STATE).is_file())

    def best_score(self) -> float | None:
        """Score of `best`, if there is one."""
        path = self.folder / "best" / STATE
        return json.loads(path.read_text())["score"] if path.is_file() else None

    def _link(self, name: str, target: str) -> None:
        temporary = self.folder / f".{name}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, self.folder / name)

    def _sweep(self) -> None:
        """Remove what a killed writer left."""
        for path in self.folder.glob(".writing-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        pinned = {os.path.realpath(self.folder / name) for name in ("last", "best")}
        others = [p for p in self.all() if os.path.realpath(p) not in pinned]
        for path in others[: max(0, len(others) - self.keep + 1)]:
            shutil.rmtree(path)


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that a rename never outlives its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
