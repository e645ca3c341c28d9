"""state.json of a checkpoint, sealed: whose it is, and that neither it nor the tensors beside it were changed.

It holds the run's config, the sha256 of state.safetensors and, as "sha256", that of all the rest of itself. Those of
earlier versions have none of the three and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

STATE, TENSORS = "state.json", "state.safetensors"
SEALED = ("config", "tensors", "sha256")
"""Of state.json: what shows whose it is and that it is whole."""


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(head: dict[str, Any]) -> str:
    """sha256 of state.json but for the sum itself."""
    return hashlib.sha256(json.dumps({k: v for k, v in head.items() if k != "sha256"}).encode()).hexdigest()


def sealed(head: dict[str, Any], tensors: str) -> str:
    """The text of state.json beside tensors of this sum."""
    head = json.loads(json.dumps(head | {"tensors": tensors}))
    return json.dumps(head | {"sha256": _seal(head)})


def read_head(path: Path) -> dict[str, Any]:
    """state.json; ValueError where it is none, or was changed since it was written."""
    try:
        head = json.loads((path / STATE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{STATE} is not JSON: {error}") from None
    if not isinstance(head, dict):
        raise ValueError(f"{STATE} is no table")
    with_seal = any(key in head for key in SEALED)
    if lacks := [key for key in ("iteration", "score", "state", *(SEALED if with_seal else ())) if key not in head]:
        raise ValueError(f"{STATE} lacks {lacks[0]!r}")
    if not isinstance(head["iteration"], int) or not isinstance(head["state"], dict):
        raise ValueError(f"{STATE} holds no iteration and no state")
    if with_seal and head["sha256"] != _seal(head):
        raise ValueError(f"{STATE} was edited or torn: its sha256 differs")
    return head


@contextmanager
def taken_up(path: Path, section: str) -> Iterator[None]:
    """Say in one line, as ValueError, why a section of a checkpoint does not fit what it is loaded into."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        why = " ".join(" ".join(str(error).splitlines()[:2]).split())  # torch lists every tensor, a line each
        what = f"{why} is missing" if isinstance(error, KeyError) else why
        raise ValueError(f"checkpoint {path} does not fit this run: {section}: {what}") from error
