"""The door of a reward server: bounds on who is inside, on the bytes they brought, and on how long they let us wait.

Whoever connects owes a request: its head within HEAD_S, its body within the server's own limit. Where there is no room
for one more connection, or for more bytes, whoever has owed the longest is turned away. A client of ours owes for
milliseconds, so strangers who connect and say nothing, or half of it, go before it however many they are.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0
MOST_BYTES = 2**30
"""Of all requests that arrive, wait or are scored."""
MOST_CONNECTIONS = 256
QUEUE = 1024
"""Connections that the system holds until they are let in."""
BUSY = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def room() -> int:
    """Connections to allow: a quarter of the handles of this process, for its reward opens files too."""
    handles, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if handles == resource.RLIM_INFINITY else max(4, min(MOST_CONNECTIONS, handles // 4))


class Door:
    """Everyone connected to one server."""

    def __init__(self, most: int, most_bytes: int):
        self.most, self.most_bytes = most, most_bytes
        self.inside: set[Visitor] = set()

    def make_room(self) -> None:
        """Turn away who has owed the longest until all fit; those whose first request is here whole stay."""
        while len(self.inside) > self.most or sum(v.held for v in self.inside) > self.most_bytes:
            owing = [v for v in self.inside if v.owes]
            if not owing:
                return
            min(owing, key=lambda v: v.since).turn_away()


class Visitor(H11Protocol):
    """A connection that knows since when it owes a request, and how many bytes of one it has brought."""

    def __init__(self, *args: Any, door: Door, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.door, self.since, self.held, self.answered = door, 0.0, 0, False
        self.patience: asyncio.TimerHandle | None = None

    @property
    def owes(self) -> bool:
        """Whether its request is not here whole; who has had an answer and asks for more may ask anew."""
        return self.answered or self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def turn_away(self) -> None:
        """End the connection; who has had no answer yet gets 503."""
        self.door.inside.discard(self)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(BUSY)
        self.transport.close()

    def _wait(self) -> None:
        if self.patience is not None:
            self.patience.cancel()
        self.since, self.held = self.loop.time(), 0
        self.patience = self.loop.call_later(HEAD_S, self._late)

    def _late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:  # no request since
            self.door.inside.discard(self)
            self.transport.close()

    def connection_made(self, transport: Any) -> None:
        """Someone came."""
        super().connection_made(transport)
        self.door.inside.add(self)
        self._wait()
        self.door.make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """They went."""
        self.door.inside.discard(self)
        if self.patience is not None:
            self.patience.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """They sent something."""
        self.held += len(data)
        self.door.make_room()
        if not self.transport.is_closing():
            super().data_received(data)

    def on_response_complete(self) -> None:
        """They have their answer, and may ask again."""
        self.answered = True
        self._wait()
        super().on_response_complete()


class Host(uvicorn.Server):
    """A web server at whose door a queue may form, though it lets in but a few at once."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve; asyncio takes one number for both, so the queue is made longer afterwards."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(QUEUE)


def visitors(most: int) -> Callable[..., Visitor]:
    """What makes the protocol of each connection of one server."""
    return partial(Visitor, door=Door(most, MOST_BYTES))
