"""run.json: how a run was started, and every time it was resumed."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rlflow import __version__
from rlflow.parallel import dist
from rlflow.train.checkpoint import write_text


def write_head(run: Path, recipe: str, facts: dict[str, Any], resumed_at: int | None) -> None:
    """Write run.json; a resume from iteration `resumed_at` joins the list of them and changes nothing else."""
    mine = {"recipe": recipe, **_now(), **facts}
    first = {} if resumed_at is None else _read(run / "run.json")
    if first:
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
