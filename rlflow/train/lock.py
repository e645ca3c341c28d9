"""One writer for a run folder: an advisory lock on RUN/.lock that dies with its process, and says who holds it.

Readers (report, eval, compare) take no lock. On a file system without locks the note inside decides: whoever wrote it
holds the folder until its process has ended, which is seen on the same machine only (elsewhere: remove the file).
"""

from __future__ import annotations

import errno
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:  # no POSIX
    fcntl = None  # type: ignore[assignment]

HELD = (errno.EAGAIN, errno.EACCES)
"""What flock says where another one holds the lock; anything else means that there are no locks here."""


class RunLock:
    """The right to write a run folder, held from `acquire` to `release` or the end of the process."""

    def __init__(self, run: Path):
        self.run, self.path = run, run / ".lock"
        self._handle: int | None = None

    def acquire(self) -> None:
        """Make the folder and hold it; BlockingIOError names who does already. Holding it twice is holding it."""
        if self._handle is not None:
            return
        self.run.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(handle, self._note()):
                raise BlockingIOError(f"{self.run} is being written by {self._holder()}: wait for it, or stop it first")
            note = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps(note).encode())
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle

    def release(self) -> None:
        """Let the next one write; the file stays, since removing it could take the lock of another."""
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
        self._handle = None

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def _note(self) -> dict[str, Any]:
        """Who wrote last; {} where nobody says."""
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def _holder(self) -> str:
        note = self._note()
        mine = " (this one)" if note.get("pid") == os.getpid() and note.get("host") == socket.gethostname() else ""
        return f"process {note.get('pid', '?')}{mine} on {note.get('host', '?')} since {note.get('since', '?')}"


def _lock(handle: int, note: dict[str, Any]) -> bool:
    """Lock an open file; False where another process holds it."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError as error:
        if error.errno in HELD:
            return False
    return not note or (note.get("host") == socket.gethostname() and not _lives(note.get("pid")))


def _lives(pid: Any) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:  # someone else's
        return True
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
