"""RunFolder: who may write a run's folder, what it was started from, and whether that is still so.

config.yaml is the config, run.json how the run was started and every time it was resumed, inputs/ what it reads.
"""

from __future__ import annotations

import json
import platform
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from rlflow import __version__
from rlflow.config import inputs
from rlflow.config.parse import difference, parse
from rlflow.config.schema import Config
from rlflow.files import write_text
from rlflow.parallel import dist
from rlflow.report.metrics_file import read_metrics
from rlflow.train.checkpoint import Checkpoints
from rlflow.train.lock import RunLock


def changes(run: Path, config: Config) -> list[str]:
    """Settings that differ from those of the run in a folder, leaving out those that may change."""
    saved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return difference(saved, config.to_dict())


class RunFolder:
    """The folder of one run, held by process 0 while it is written; `resumed`: a run goes on in it."""

    def __init__(self, path: Path, config: Config, recipe: str, resumed: bool):
        self.path, self.config, self.recipe, self.resumed = path, config, recipe, resumed
        self.lock, self._begun = RunLock(path), False

    def enter(self) -> None:
        """Hold the folder if there is one, and check that this run may be written there."""
        if dist.rank() == 0 and self.path.exists():
            self.lock.acquire()
        self._check()

    def begin(self, facts: dict[str, Any], iteration: int) -> None:
        """Hold the folder, and write how the run starts, or goes on after `iteration`."""
        if dist.rank() == 0:
            self.lock.acquire()
            if not self._begun:
                if not self.resumed:  # another run may have come and gone since `enter`
                    self._check()
                self._write(facts, iteration)
            self._begun = True
        dist.barrier()

    def end(self, stopped: str) -> None:
        """Note in run.json which rule ended the run before its budget, if one did; it goes when the run goes on."""
        if dist.rank() == 0 and stopped:
            path = self.path / "run.json"
            write_text(path, json.dumps(_read(path) | {"stopped": stopped}, indent=1) + "\n")

    def noted(self, name: str) -> Any:
        """What run.json says of how the run started; None where it says nothing."""
        return _read(self.path / "run.json").get(name)

    def leave(self) -> None:
        """Let others write."""
        self.lock.release()

    def at_hand(self, trust_code: bool) -> Config:
        """The config with the run's own copies of what is gone or was changed."""
        if not self.resumed:
            return self.config
        values, changed = inputs.at_hand(self.path, self.config.to_dict())
        if dist.rank() == 0:
            for line in changed:
                warnings.warn(line, stacklevel=2)
        return parse(values, trust_code) if values != self.config.to_dict() else self.config

    def _check(self) -> None:
        saved = self.path / "config.yaml"
        if not self.resumed:
            if dist.rank() == 0 and saved.exists() and self._has_begun():
                raise FileExistsError(f"{self.path} holds a run: pass --resume last, or another --run folder")
            return
        if not saved.exists():
            raise FileNotFoundError(f"nothing to resume: {saved} does not exist")
        if changed := changes(self.path, self.config):
            raise ValueError("refusing to resume under a changed config:\n  " + "\n  ".join(changed))
        if changed := inputs.changed_for_good(self.path, self.config.to_dict()):
            raise ValueError("refusing to resume, put back what the run began with: " + "; ".join(changed))

    def _has_begun(self) -> bool:
        """False for a folder whose run ended before it trained: it holds nothing to continue or to lose."""
        return bool(Checkpoints(self.path).all()) or any(row["kind"] == "train" for row in read_metrics(self.path))

    def _write(self, facts: dict[str, Any], iteration: int) -> None:
        if not self.resumed:
            inputs.forget(self.path)
        write_text(self.path / "config.yaml", self.config.to_yaml())
        inputs.keep(self.path, self.config.to_dict())
        write_head(self.path, self.recipe, facts, iteration if self.resumed else None)


def write_head(run: Path, recipe: str, facts: dict[str, Any], resumed_at: int | None) -> None:
    """Write run.json; a resume from iteration `resumed_at` joins the list of them and changes nothing else."""
    mine = {"recipe": recipe, **_now(), **facts}
    first = {} if resumed_at is None else _read(run / "run.json")
    if first:
        first.pop("stopped", None)
        mine = first | {"resumes": [*first.get("resumes", []), {"iteration": resumed_at, **mine}]}
    write_text(run / "run.json", json.dumps(mine, indent=1) + "\n")


def _now() -> dict[str, Any]:
    return {
        "command": " ".join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"rlflow": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "world": dist.world(),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def default_run(recipe: str) -> Path:
    """runs/RECIPE-TIME, where no folder was named."""
    return Path("runs") / f"{Path(recipe).stem}-{datetime.now():%Y%m%d-%H%M%S}"
