"""Call a function under a deadline, in a daemon thread that never holds up process exit.

One thread serves one function for all its calls (a new thread per call would build a new OpenMP pool
each time). A call that misses its deadline leaves its thread behind: the late answer goes to the
finished call's own slot, which nobody reads any more, so it cannot be taken for a later batch's.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

MAX_LATE = 4
"""Threads still busy with calls that timed out, per function; beyond it a call fails at once."""


class _Call:
    """One call and the slot of its answer."""

    def __init__(self, fn: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        self.fn, self.arguments = fn, arguments
        self.done = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with torch.no_grad():  # the grad mode of the caller does not reach another thread
                self.value = self.fn(**self.arguments)
        except BaseException as error:  # SystemExit too: the thread has to live on
            self.error = error
        finally:
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
        self._late = [thread for thread in self._late if thread.is_alive()]
        if len(self._late) >= MAX_LATE:
            raise TimeoutError(f"not called: {MAX_LATE} earlier calls are still running past their deadline")
        call, worker = _Call(self.fn, arguments), self._idle_worker()
        worker.calls.put(call)
        if not call.done.wait(self.seconds):
            self._abandon(worker)
            raise TimeoutError(f"no answer within {self.seconds:g} s")
        if isinstance(call.error, Exception):
            raise call.error
        if call.error is not None:
            # SystemExit and its kind must not end the caller
            raise RuntimeError(f"{type(call.error).__name__}: {call.error}")
        return call.value

    def _idle_worker(self) -> _Worker:
        if self._worker is None or not self._worker.thread.is_alive():  # dead in a forked child
            self._worker = _Worker(f"reward-{self.name}")
        return self._worker

    def _abandon(self, worker: _Worker) -> None:
        worker.calls.put(None)  # it ends after the late call
        self._late.append(worker.thread)
        self._worker = None
