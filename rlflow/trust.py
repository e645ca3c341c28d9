"""Code outside the package runs only where it is trusted, whoever would import it."""

from __future__ import annotations

import os
import sys
from typing import Any


class UntrustedCodeError(ValueError):
    """A dotted path was met where only registered names are allowed."""


def check_trusted(what: str, trust_code: bool) -> None:
    """UntrustedCodeError for code outside rlflow unless it is trusted; then it is looked for here, too."""
    if not trust_code:
        raise UntrustedCodeError(f"{what}: pass --trust-code (trust_code=True) to run it")
    if os.getcwd() not in sys.path:  # the `rlflow` command, unlike `python -m`, does not look where it stands
        sys.path.append(os.getcwd())


IMPORTS_NAMES = ("env",)
"""Kinds of components that hand texts on to libraries which import what stands before a colon (gymnasium.make)."""


def check_texts(value: Any, trust_code: bool) -> None:
    """UntrustedCodeError for a text with a colon anywhere in the settings of an environment."""
    if isinstance(value, str) and ":" in value:
        check_trusted(f"{value!r} can name a module to import, code outside rlflow", trust_code)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_texts(part, trust_code)
