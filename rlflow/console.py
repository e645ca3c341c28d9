"""What a command says: an error as one line, how far a step is, results for machines as JSON in the strict sense."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

RANK_WAITS = 10.0
"""Seconds: an error that all ranks share ends rank 0, and the launcher the others, before they repeat it."""
EVERY = 10.0
"""Seconds between two lines on one long step."""


def say_error(message: str) -> None:
    """One line on stderr; of several processes rank 0 speaks, another one only if it is still alive a while later."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(RANK_WAITS)
    print(f"rlflow: error: {'' if rank == '0' else f'process {rank}: '}{message}", file=sys.stderr, flush=True)


def counted(num: int, what: str) -> Iterator[int]:
    """0 .. num - 1, and once in a while a line on stdout: how many `what` are done, about how long the rest takes."""
    begin = said = time.monotonic()
    for done in range(num):
        now = time.monotonic()
        if done and now - said >= EVERY:
            said, left = now, (now - begin) / done * (num - done)
            print(f"{done} of {num} {what}  {now - begin:.0f} s, about {left:.0f} s left", flush=True)
        yield done


def finite(value: Any) -> Any:
    """Nested values with None in place of every number that is not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json(values: Any) -> None:
    """Indented JSON on stdout."""
    print(json.dumps(finite(values), indent=1, allow_nan=False))


def terminal() -> Any:
    """A rich Console on stdout; into a file or a pipe 160 columns wide, since its 80 break the words of a table."""
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=160) if wide else Console()
