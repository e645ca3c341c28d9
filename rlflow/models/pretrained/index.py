"""model_index.json of a diffusers folder: which classes it names, and that no code of a stranger is among them.

Diffusers and transformers import what a folder names: a library by its name, a file beside the weights, or through
`auto_map` one of another repository. Newer versions ask or refuse; of ours none gets that far.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LIBRARIES = ("diffusers", "transformers")
"""Those that components of a pipeline are of."""
UNUSED = ("safety_checker", "feature_extractor")
"""Components that are never loaded, whatever they are: what Stable Diffusion 1 puts behind its pictures."""
NONE = [None, None]
"""Entry of a component that a folder does not have."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table; ValueError that names the file where it is something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no JSON table")
    return values


def check_index(checkpoint: str, index: dict[str, Any]) -> None:
    """ValueError for a component of a library that is not diffusers or transformers."""
    for name, entry in index.items():
        if not isinstance(entry, list) or entry == NONE or name in UNUSED:
            continue
        if len(entry) != 2 or entry[0] not in LIBRARIES or not isinstance(entry[1], str) or _asks(*entry):
            raise ValueError(
                f"{checkpoint}: model_index.json takes {name} from {entry}, code outside {' and '.join(LIBRARIES)}, "
                "which rlflow does not run: give a pipeline of their own classes"
            )


def _asks(library: str, name: str) -> bool:
    """True of the classes that look for code in a repository, and ask on the terminal whether to run it."""
    return library == "transformers" and name.startswith("Auto")


def check_folder(folder: Path) -> None:
    """ValueError for Python files in a pipeline's folder, or a config that names code to fetch."""
    if code := sorted(folder.rglob("*.py")):
        raise ValueError(f"{code[0]} is code in a pipeline's folder, which rlflow does not run: remove it")
    for path in sorted(folder.rglob("*config*.json")):
        if "auto_map" in read_json(path):
            raise ValueError(f"{path} names code to fetch (auto_map), which rlflow does not run: remove that entry")
