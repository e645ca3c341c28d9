"""A reward server: one reward behind HTTP, for a card or a machine of its own (`rlflow serve-reward`).

    GET  /health   {"status", "reward", "columns", "protocol", "waiting", "rows", "errors"}
    POST /score    a batch of wire.py; answers its scores, or 400 413 (the request), 401 (the token), 408 (too slow),
                   500 (the reward failed), 503 (too many wait, or no room), 504 (the reward took too long)

One batch is scored at a time, by one thread. It listens on this machine alone unless there is a token, and ends on
SIGTERM after the batches it has. door.py bounds connections, bytes and idleness.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from rlflow.rewards.calls import Deadline, check_seconds
from rlflow.rewards.remote.ask import find_token, is_loopback
from rlflow.rewards.remote.client import PROTOCOL
from rlflow.rewards.remote.columns import Expected
from rlflow.rewards.remote.wire import Batch, answer, read, widened
from rlflow.rewards.scores import Scores, scored

log = logging.getLogger(__name__)

UPLOAD_S = 60.0
GRACE_S = 60


class Refused(Exception):
    """An answer other than 200: its status, and why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Service:
    """One reward, its limits and its counters."""

    def __init__(
        self,
        name: str,
        fn: Callable[..., Scores | None],
        *,
        token: str | None = None,
        timeout_s: float = 60.0,
        max_bytes: int = 256 * 2**20,
        max_waiting: int = 16,
    ):
        check_seconds("timeout_s (--timeout)", timeout_s)
        self.name, self.expected, self.max_bytes, self.max_waiting = name, Expected(fn), max_bytes, max_waiting
        self.rows, self.errors, self.waiting = 0, 0, 0
        self._token = token
        self._call = Deadline(name, fn, timeout_s)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="score")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that the reward reads."""
        return self.expected.names

    def health(self) -> dict[str, Any]:
        """What /health says."""
        counters = {"waiting": self.waiting, "rows": self.rows, "errors": self.errors}
        return {"status": "ok", "reward": self.name, "columns": list(self.columns), "protocol": PROTOCOL, **counters}

    def check_token(self, header: str) -> None:
        """Refused (401) unless the Authorization header carries the token, if there is one."""
        if self._token is not None and not hmac.compare_digest(header.encode(), f"Bearer {self._token}".encode()):
            raise Refused(401, "wrong or missing token")

    async def body(self, request: Any) -> bytes:
        """The request's body; Refused when it is too long (413) or too slow (408)."""
        content = bytearray()
        try:
            async with asyncio.timeout(UPLOAD_S):
                async for part in request.stream():
                    content += part
                    if len(content) > self.max_bytes:
                        raise Refused(413, f"more than {self.max_bytes} bytes: send fewer rows")
        except TimeoutError:
            raise Refused(408, f"the request took more than {UPLOAD_S:g} s to arrive") from None
        return bytes(content)

    async def score(self, batch: Batch) -> Tensor:
        """(N,) scores, after the batches that wait already."""
        if self.waiting >= self.max_waiting:
            raise Refused(503, f"{self.waiting} batches wait already")
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._score, batch)
        finally:
            self.waiting -= 1

    def _score(self, batch: Batch) -> Tensor:
        try:
            columns = widened(batch).columns  # here, or every batch that waits would be four times as large
            given = {name: columns[name] for name in self.columns}
            scores, reason = scored(lambda: self._call(given), batch.rows)
            if reason is not None:
                self.errors += 1
                log.warning("reward %r scored some rows only: %s", self.name, reason)
        except TimeoutError as error:
            self.errors += 1
            raise Refused(504, str(error)) from None
        except Exception as error:  # whatever user code raises
            self.errors += 1
            words = str(error).encode("utf-8", "backslashreplace").decode()  # a log may be no place for half a letter
            log.warning("reward %r failed: %s: %s", self.name, type(error).__name__, words)
            raise Refused(500, f"{type(error).__name__}: {error}") from None
        self.rows += batch.rows
        return scores

    async def answer(self, request: Any) -> dict[str, Any]:
        """What /score says; Refused otherwise."""
        self.check_token(request.headers.get("authorization", ""))
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            raise Refused(413, f"more than {self.max_bytes} bytes: send fewer rows")
        try:
            batch = read(await self.body(request))
            self.expected.check(batch.columns)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        return answer(batch, await self.score(batch))


def make_app(service: Service) -> Any:
    """The web application of a service."""
    try:
        from starlette.applications import Starlette
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import Response
        from starlette.routing import Route
    except ImportError:
        raise ImportError("a reward server needs starlette and uvicorn: pip install 'rlflow-torch[remote]'") from None

    def said(value: dict[str, Any], status: int = 200) -> Response:
        return Response(json.dumps(value), status, media_type="application/json")  # in ASCII, whatever a message holds

    async def health(request: Request) -> Response:
        return said(service.health())

    async def score(request: Request) -> Response:
        try:
            return said(await service.answer(request))
        except Refused as refused:
            return said({"error": str(refused)}, refused.status)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it

    return Starlette(routes=[Route("/health", health), Route("/score", score, methods=["POST"])])


def listen(service: Service, host: str, port: int) -> tuple[Any, socket.socket]:
    """A uvicorn server and its listening socket, on which `server.run(sockets=[socket])` serves; port 0: a free one."""
    app = make_app(service)
    import uvicorn

    from rlflow.rewards.remote.door import QUEUE, Host, room, visitors

    most = room()
    config = uvicorn.Config(
        app,
        http=visitors(most),
        ws="none",
        log_level="error",
        access_log=False,
        backlog=max(4, most // 4),  # as many are let in at once, before anyone can be turned away
        timeout_graceful_shutdown=GRACE_S,
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(QUEUE)
    except (OSError, OverflowError) as error:
        listener.close()
        why = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"cannot listen on {host}:{port}: {why}; choose another --port") from None
    return Host(config), listener


def check_open(host: str, token: str | None, token_env: str) -> None:
    """ValueError for a server that everyone could use."""
    if token is None and not is_loopback(host):
        raise ValueError(f"--host {host} is open to others: set the environment variable {token_env} to a token first")


def serve(name: str, fn: Callable[..., Scores | None], host: str, port: int, token_env: str, timeout_s: float) -> None:
    """Serve a reward until SIGTERM or Ctrl-C."""
    token = find_token(token_env)
    check_open(host, token, token_env)
    service = Service(name, fn, token=token, timeout_s=timeout_s)
    server, listener = listen(service, host, port)
    shown = f"http://{host if ':' not in host else f'[{host}]'}:{listener.getsockname()[1]}"
    print(f"{name} (columns {', '.join(service.columns)}) on {shown}", flush=True)
    server.run(sockets=[listener])
