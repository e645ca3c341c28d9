"""A circuit breaker: after some failures in a row a server is left alone for a while, then tried once.

closed --failures in a row--> open --after rest_s--> half open: one trial --success--> closed
                                ^------------------------failure---------------|
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rlflow.registry import SettingError
from rlflow.rewards.calls import check_seconds


class Breaker:
    """Counts failures in a row; thread-safe."""

    def __init__(self, failures: int = 6, rest_s: float = 30.0, clock: Callable[[], float] = time.monotonic):
        if failures < 1:
            raise SettingError("failures", f"must be 1 or more, got {failures}")
        check_seconds("rest_s", rest_s, allows_none=True)
        self.failures, self.rest_s, self.clock = failures, rest_s, clock
        self.in_a_row = 0
        self._until = 0.0
        self._trying = False
        self._lock = threading.Lock()

    def allows(self) -> bool:
        """Whether to ask now; while open only one asker, after the rest."""
        with self._lock:
            if self.in_a_row < self.failures:
                return True
            if self._trying or self.clock() < self._until:
                return False
            self._trying = True
            return True

    def succeeded(self) -> None:
        """An answer came: closed."""
        with self._lock:
            self.in_a_row, self._trying = 0, False

    def failed(self) -> None:
        """No answer, or a wrong one."""
        with self._lock:
            self.in_a_row += 1
            self._trying = False
            self._until = self.clock() + self.rest_s
