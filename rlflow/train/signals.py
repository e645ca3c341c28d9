"""Signals: Ctrl-C and SIGTERM end a run in order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StoppedAtOnce(KeyboardInterrupt):
    """A second signal while the work was finishing in order."""


@contextmanager
def sigterm_is_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Signals:
    """Inside, the first SIGINT or SIGTERM calls `stop`, so that the work finishes in order; the second ends at once."""

    def __init__(self, stop: Callable[[], None]):
        self.stop, self.asked = stop, False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise StoppedAtOnce("stopped at once by a second signal: --resume last goes on from the last checkpoint")
        self.asked = True
        self.stop()

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
