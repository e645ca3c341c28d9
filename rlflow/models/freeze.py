"""Parameters that do not train, by name."""

from __future__ import annotations

import re

from rlflow.flow.field import VelocityField


def freeze(field: VelocityField, pattern: str) -> None:
    """Exclude parameters in whose names the regular expression is found; ValueError if it finds none, or all."""
    try:
        found = {name for name, _ in field.named_parameters() if re.search(pattern, name)}
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    everything = {name for name, _ in field.named_parameters()}
    if not found or found == everything:
        parts = sorted({name.partition(".")[0] for name in everything})
        raise ValueError(
            f"{pattern!r} is found in {'all' if found else 'no'} parameters: set it to null, or name {parts}"
        )
    for name, parameter in field.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in found)
