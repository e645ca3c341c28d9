"""Checkpoints: atomic folders of safetensors and JSON; complete enough for a bitwise resume; no pickle."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from rlflow.config.inputs import absolute
from rlflow.config.parse import difference
from rlflow.files import read_tensors, save_tensors, sync, write_text
from rlflow.models.io import check_finite
from rlflow.rl.groups import Groups
from rlflow.train.seal import STATE, TENSORS, read_head, sealed, sha256

LEARNT = ("policy/", "weight_sets/", "algorithm/")
"""Beginnings of the names of tensors that are weights, of all sets and critics, or moments of their optimisers."""


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
        if value["$tensor"] not in tensors:
            raise ValueError(f"{TENSORS} lacks {value['$tensor']!r}, which {STATE} names")
        return tensors[value["$tensor"]]
    if "$list" in value:
        return [unpack(tensors, v) for v in value["$list"]]
    return {k: unpack(tensors, v) for k, v in value.items()}


def deal(states: Sequence[Any], groups: Groups) -> Any:
    """This process's part of `states`, the trees that the processes of the run so far saved, in their order.

    For another number of processes, tensors that lead with rows are joined and dealt anew, 0-d ones are what all
    share. ValueError where a tree holds anything else: rows cannot be told apart in it.
    """
    if len(states) == groups.world:
        return states[groups.rank]
    rows = groups.total_rows // len(states)

    def share(path: str, parts: Sequence[Any]) -> Any:
        first = parts[0]
        if isinstance(first, dict):
            return {name: share(f"{path}/{name}", [part[name] for part in parts]) for name in first}
        if isinstance(first, Tensor) and first.ndim and len(first) == rows:
            return torch.cat(list(parts)).split(groups.num_rows)[groups.rank]
        if isinstance(first, Tensor) and not first.ndim and all(torch.equal(first, part) for part in parts):
            return first
        raise ValueError(
            f"{path.lstrip('/')} of {len(states)} processes cannot be shared by {groups.world}: save tensors that "
            "lead with the rows, and 0-d ones for what all rows share; or resume with as many processes as before"
        )

    return share("", states)


def learnt(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose numbers have to be finite."""
    return {name: value for name, value in tensors.items() if name.startswith(LEARNT)}


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
    """The folder RUN/checkpoints: NNNNNN/ per iteration, links `last` and `best`; the newest `keep` and `best` stay.

    One older than `last` stays in any case: whether weights still train is known only after the next step.
    """

    def __init__(self, run: Path, keep: int = 3, config: dict[str, Any] | None = None):
        self.run, self.folder, self.keep, self.config = run, run / "checkpoints", keep, config

    def save(self, iteration: int, state: dict[str, Any], score: float | None = None, *, prune: bool = True) -> Path:
        """Write state of `iteration` completely or not at all; `score` (higher is better) may move `best`.

        Saved a second time, only the numbers are written again: weights change with the iteration alone,
        the last evaluation may have come since. ValueError for what `load` would refuse.
        """
        final = self.folder / f"{iteration:06d}"
        tensors, values = pack(state)
        check_finite(learnt(tensors), f"the checkpoint of iteration {iteration} was not written")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            head = {"iteration": iteration, "score": score, "config": self.config, "state": values}
            if _complete(final):
                write_text(final / STATE, sealed(head, _sum_of(final)))
            else:
                self._write_folder(final, tensors, head)
            self._link("last", final.name)
            if self.beats_best(score):
                self._link("best", final.name)
        except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
            raise OSError(
                f"could not write the checkpoint of iteration {iteration} ({error}): {_remedy(error)}; "
                "earlier checkpoints are intact and --resume last continues from them"
            ) from error
        if prune:
            self._prune()
        return final

    def _write_folder(self, final: Path, tensors: dict[str, Tensor], head: dict[str, Any]) -> None:
        work = self.folder / f".writing-{final.name}"
        work.mkdir()
        try:
            save_tensors(tensors, work / TENSORS)
            sync(work / TENSORS)
            write_text(work / STATE, sealed(head, sha256(work / TENSORS)))
            os.replace(work, final)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        sync(self.folder)

    def load(self, which: str | int | Path = "last") -> tuple[int, dict[str, Any]]:
        """(iteration, state) of 'last', 'best', an iteration number or a path.

        ValueError that names the file, and the key, of what is damaged, not finite, or of another run.
        """
        path = self.path(which)
        try:
            head = read_head(path)
            if head.get("tensors") not in (None, sha256(path / TENSORS)):
                raise ValueError(f"{TENSORS} is not what was saved: its sha256 differs")
            tensors = read_tensors(path / TENSORS)
            state = unpack(tensors, head["state"])
            check_finite(learnt(tensors), TENSORS)
        except ValueError as error:
            others = [p.name for p in self.all() if p.name != path.resolve().name]
            raise ValueError(
                f"checkpoint {path} is damaged ({error}): resume from another one, there are {others or 'none'}"
            ) from error
        self._check_origin(path, head)
        return head["iteration"], state

    def _check_origin(self, path: Path, head: dict[str, Any]) -> None:
        """ValueError for a checkpoint of a run with another config, by its own word or by the run it lies in."""
        mine = self.config or _config_of(self.run)
        theirs = head.get("config") or _config_of(path.resolve().parent.parent)
        if mine and theirs and (changed := difference(absolute(theirs), absolute(mine))):
            raise ValueError(f"checkpoint {path} is of another run: " + ", ".join(changed))

    def head(self, which: str | int | Path = "last") -> dict[str, Any]:
        """The numbers of a checkpoint, without its tensors."""
        return read_head(self.path(which))["state"]

    def cut(self, iteration: int) -> None:
        """Forget checkpoints after `iteration`, when a run goes on from an earlier one."""
        self._sweep()
        late = [p for p in self.all() if int(p.name) > iteration]
        kept = [p for p in self.all() if int(p.name) <= iteration]
        if kept:  # the links move first: a kill in between leaves none that points nowhere
            self._link("last", kept[-1].name)
        scores = {p.name: score for p in kept if (score := _score(p)) is not None}
        if scores:
            self._link("best", max(scores, key=lambda name: scores[name]))
        else:
            (self.folder / "best").unlink(missing_ok=True)
        for path in late:
            _remove(path)

    def path(self, which: str | int | Path = "last") -> Path:
        """The folder of a checkpoint; ValueError names what exists."""
        name = str(which).zfill(6) if str(which).isdigit() else str(which)
        known = self.all()
        candidates = [self.folder / name, Path(str(which)), *(known[-1:] if name == "last" else [])]
        for path in candidates:
            if _complete(path):
                return path
        names = [p.name for p in known]
        raise ValueError(f"no checkpoint {str(which)!r} in {self.folder}: there are {names or 'none'}")

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if p.name.isdigit() and _complete(p))

    def best_score(self) -> float | None:
        """Score of `best`, if there is one."""
        path = self.folder / "best"
        return _score(path) if _complete(path) else None

    def beats_best(self, score: float | None) -> bool:
        """True for a score above that of every checkpoint so far."""
        best = self.best_score()
        return score is not None and (best is None or score > best)

    def ways_on(self, last_good: int) -> str:
        """What is left after non-finite steps; only a good step after it, up to `last_good`, proves a checkpoint."""
        kept = [int(path.name) for path in self.all()]
        proven = [i for i in kept if i < last_good or i == 0]
        if not proven:
            return "No checkpoint is from before: begin again"
        doubt = f"; {late} may be spoilt" if (late := [i for i in kept if i not in proven]) else ""
        return f"Checkpoint {proven[-1]} is from before (--resume {proven[-1]}){doubt}"

    def _link(self, name: str, target: str) -> None:
        temporary = self.folder / f".{name}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, self.folder / name)

    def _sweep(self) -> None:
        """Remove what a killed writer left."""
        for path in [*self.folder.glob(".writing-*"), *self.folder.glob(".removing-*")]:
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        pinned = {os.path.realpath(self.folder / name) for name in ("last", "best")}
        others = [p for p in self.all() if os.path.realpath(p) not in pinned]
        spare = max(1, self.keep - 1)
        for path in others[: max(0, len(others) - spare)]:
            _remove(path)


def _remedy(error: Exception) -> str:
    """What to do about an error of writing; safetensors says the system's in its own words."""
    if isinstance(error, PermissionError):
        return "allow this user to write there"
    full = isinstance(error, SafetensorError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return "free some space" if full else "see that the folder is there and can be written"


def _complete(path: Path) -> bool:
    return (path / STATE).is_file() and (path / TENSORS).is_file()


def _config_of(run: Path) -> dict[str, Any]:
    """The config of a run folder; {} where there is none."""
    path = run / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _sum_of(path: Path) -> str:
    """The sum of a checkpoint's tensors as it was when they were written; anew where nobody noted it."""
    try:
        return str(read_head(path)["tensors"])
    except (ValueError, KeyError):
        return sha256(path / TENSORS)


def _score(path: Path) -> float | None:
    """The score a checkpoint was saved with; None where it has none or cannot be read."""
    try:
        return json.loads((path / STATE).read_text())["score"]
    except (OSError, ValueError, KeyError):
        return None


def _remove(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that a kill leaves no half of one under a valid name."""
    gone = path.with_name(f".removing-{path.name}")
    os.replace(path, gone)
    shutil.rmtree(gone)
