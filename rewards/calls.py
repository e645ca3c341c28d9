"""Call a function under a deadline, in a daemon thread that never holds up process exit.

One thread serves one function for all its calls (a new thread per call would build a new OpenMP pool
each time). A call that misses its deadline leaves its thread behind: the late answer goes to the
finished call's own slot, which nobody reads any more, so it cannot be taken for a later batch's.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from rlflow.registry import SettingError

SHORTEST, LONGEST = 1e-3, 1e6
"""Seconds of a limit that somebody can have meant: no answer comes within less, and locks cannot wait for much more."""
MAX_LATE = 4
"""Threads still busy with calls that timed out, per function; beyond it a call fails at once."""


def check_seconds(what: str, value: float, allows_none: bool = False) -> None:
    """ValueError unless `value` is a time that can be kept, or 0 where that means none; `what` names the setting."""
    if not SHORTEST <= value <= LONGEST and not (allows_none and value == 0):
        raise SettingError(what, f"must be seconds from {SHORTEST:g} to {LONGEST:g}, got {value}")


class _Call:
    """One call and the slot of its answer."""

    def __init__(self, fn: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        self.fn, self.arguments = fn, arguments
        self.done = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None
        self.ended: float | None = None

    def run(self) -> None:
        try:
            with torch.no_grad():  # the grad mode of the caller does not reach another thread
                self.value = self.fn(**self.arguments)
        except BaseException as error:  # SystemExit too: the thread has to live on
            self.error = error
        finally:
            self.ended = time.monotonic()
            self.done.set()


class _Worker:
    """A daemon thread that runs the calls put to it, until told to stop."""

    def __init__(self, name: str) -> None:
        self.calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while (call := self.calls.get()) is not None:
            call.run()
            del call  # or its images would live until the next call


class Pending:
    """A call under way; calling this waits for its value."""

    def __init__(self, call: _Call, seconds: float, too_late: Callable[[], None]) -> None:
        self.call, self.seconds, self.too_late = call, seconds, too_late
        self.started = time.monotonic()

    def __call__(self) -> Any:
        """The value; raises what the function raised, TimeoutError past the deadline."""
        left = None if self.seconds == float("inf") else max(0.0, self.started + self.seconds - time.monotonic())
        if not self.call.done.wait(left):
            self.too_late()
            raise TimeoutError(f"no answer within {self.seconds:g} s")
        if isinstance(self.call.error, Exception):
            raise self.call.error
        if self.call.error is not None:
            # SystemExit and its kind must not end the caller
            raise RuntimeError(f"{type(self.call.error).__name__}: {self.call.error}")
        return self.call.value

    @property
    def spent(self) -> float:
        """Seconds from its start to its end, or until now."""
        return (self.call.ended or time.monotonic()) - self.started


class Deadline:
    """Calls `fn`, each call for at most `seconds` (inf: no limit, in the caller's own thread)."""

    def __init__(self, name: str, fn: Callable[..., Any], seconds: float) -> None:
        self.name, self.fn, self.seconds = name, fn, seconds
        self._worker: _Worker | None = None
        self._late: list[threading.Thread] = []

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """fn(**arguments); raises what it raised, TimeoutError past the deadline."""
        if self.seconds == float("inf"):
            with torch.no_grad():
                return self.fn(**arguments)
        return self.start(arguments)()

    def start(self, arguments: Mapping[str, Any]) -> Pending:
        """Begin a call in another thread; its errors, if any, come when its value is asked for."""
        self._late = [thread for thread in self._late if thread.is_alive()]
        call = _Call(self.fn, arguments)
        if len(self._late) >= MAX_LATE:
            call.error = TimeoutError(f"not called: {MAX_LATE} earlier calls are still running past their deadline")
            call.done.set()
            return Pending(call, self.seconds, lambda: None)
        worker = self._idle_worker()
        worker.calls.put(call)
        return Pending(call, self.seconds, lambda: self._abandon(worker))

    def _idle_worker(self) -> _Worker:
        if self._worker is None or not self._worker.thread.is_alive():  # dead in a forked child
            self._worker = _Worker(f"reward-{self.name}")
        return self._worker

    def _abandon(self, worker: _Worker) -> None:
        worker.calls.put(None)  # it ends after the late call
        self._late.append(worker.thread)
        self._worker = None
