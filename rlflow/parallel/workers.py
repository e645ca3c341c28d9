"""Commands run as processes side by side, one thread each; a signal is handed on once, so that runs checkpoint.

A process holds a lock for as long as it lives: if this program is killed, its successor does not start what
still runs.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

POLL_SECONDS = 0.1


class Workers:
    """Runs `commands` by title, `num` at a time; output goes to LOGS/title.log.

    `done[title]()` says after a command has ended well whether its work is complete, `rest(titles)` what is told of
    those that run or wait.
    """

    def __init__(
        self,
        commands: Mapping[str, Sequence[str]],
        done: Mapping[str, Callable[[], bool]],
        logs: Path,
        num: int,
        rest: Callable[[Sequence[str]], str] | None = None,
    ):
        self.commands, self.done, self.logs, self.num, self.rest = commands, done, logs, num, rest
        self.running: dict[subprocess.Popen[bytes], str] = {}
        self.stopped = False
        self.failed: list[str] = []

    def run(self) -> list[str]:
        """Run all of them; returns a line for each that failed. KeyboardInterrupt after a signal."""
        self.logs.mkdir(parents=True, exist_ok=True)
        waiting = list(self.commands)
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.running or (waiting and not self.stopped):
                while waiting and len(self.running) < self.num and not self.stopped:
                    self._start(waiting.pop(0))
                time.sleep(POLL_SECONDS)
                self._reap(waiting)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopped:
            raise KeyboardInterrupt("stopped: run the same command again to go on")
        return self.failed

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self.stopped:
            print("stopping: waiting for checkpoints; the same command goes on from them", flush=True)
            for process in self.running:
                process.send_signal(signal.SIGTERM)
        self.stopped = True

    def _start(self, title: str) -> None:
        with (self.logs / f"{title}.log").open("ab") as out, (self.logs / f"{title}.lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.failed.append(f"{title}: still runs since an earlier sweep; wait for it, or stop it")
                return
            process = subprocess.Popen(
                self.commands[title],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C reaches them through us, once
                pass_fds=[lock.fileno()],
            )
        self.running[process] = title

    def _reap(self, waiting: Sequence[str]) -> None:
        for process in [p for p in self.running if p.poll() is not None]:
            title = self.running.pop(process)
            done = process.returncode == 0 and self.done[title]()
            failed = not done and not self.stopped
            said = f"FAILED with exit code {process.returncode}" if failed else "done" if done else "stopped"
            print(f"{title}: {said} ({len(self.running)} running, {len(waiting)} waiting)", flush=True)
            left = [*self.running.values(), *waiting]
            if done and left and self.rest is not None:
                print(f"  {self.rest(left)}", flush=True)
            if failed:
                log = self.logs / f"{title}.log"
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                self.failed.append(f"{title}: {lines[-1] if lines else 'no output'} (see {log})")
