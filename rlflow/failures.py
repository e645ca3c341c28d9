"""From an exception to the one line that its user can act on: what was wrong, in which component, what sizes it.

An error that is none of these is a fault of rlflow, and keeps its traceback.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

from rlflow import registry

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED|calculation overflowed")
"""What PyTorch's RuntimeErrors say, of CUDA, of the CPU's allocator and of sizes beyond any."""
ASKED = re.compile(r"tried to allocate ([\d.]+ [A-Za-z]+)", re.IGNORECASE)
PLAN = "; `rlflow plan` says what each part needs"
SIZES = "env.rows_per_call, algorithm.micro_batch or eval.rows_per_call"


class OutOfMemoryError(MemoryError):
    """Memory of a device or of the machine ran out; the message names the settings that size what did not fit."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for PyTorch's errors, which are RuntimeErrors told apart by their text, and for Python's and NumPy's."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None
    )


@contextmanager
def sized_by(what: str, config: object, *paths: str) -> Iterator[None]:
    """Say of memory that runs out inside that `what` did it, and which settings of `config` size it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        settings = [f"{path}={reduce(getattr, path.split('.'), config)}" for path in paths]
        raise OutOfMemoryError(f"{_no_memory(error)} in {what}: lower {', '.join(settings)}{PLAN}") from error


def _no_memory(error: BaseException) -> str:
    asked = ASKED.search(str(error))
    return f"out of memory ({asked[1]} were asked for)" if asked else "out of memory"


def one_line(error: Exception) -> str | None:
    """What a user can mend, in one message; None for a fault of ours."""
    import yaml

    of_users = (ValueError, OSError, KeyError, ImportError, FloatingPointError, NotImplementedError, yaml.YAMLError)
    if isinstance(error, OutOfMemoryError):
        return str(error)
    if is_out_of_memory(error):
        return f"{_no_memory(error)}: lower {SIZES}, or what the command line asks for (--num){PLAN}"
    if (place := _foreign_place(error)) is not None:
        return f"{place} raised {_said(error)}"
    if isinstance(error, of_users):
        return _message(error)
    if not registry.FOREIGN:
        return None
    names = ", ".join(f"{kind} {name!r}" for kind, name in registry.FOREIGN)
    return f"{_said(error)}; code outside rlflow takes part: {names} (rlflow --debug COMMAND ... shows where)"


def _message(error: Exception) -> str:
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return message or _said(error)


def _said(error: Exception) -> str:
    """Its type and message; of one without a message the function."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" in {last[0].name} ({Path(last[0].filename).name}, line {last[0].lineno})" if last else ""
    return f"{type(error).__name__}{f': {error}' if str(error) else where}"


def _foreign_place(error: Exception) -> str | None:
    """'kernel 'mine:K' (mine.py, line 12, in step)': the last line in a foreign component's file; None without one."""
    if isinstance(error, ValueError) and error.__cause__ is not None:
        return None  # located: says its setting already
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for (kind, name), file in registry.FOREIGN.items():
            if frame.filename == file:
                return f"{kind} {name!r} ({Path(file).name}, line {frame.lineno}, in {frame.name})"
    return None
