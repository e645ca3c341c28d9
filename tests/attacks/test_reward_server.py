"""A reward server that lies, and strangers at ours: no row ever gets a wrong score, and who asks honestly is served.

On this machine alone, at most 100 connections at a time, each for seconds.
"""

import gzip
import json
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from rlflow.rewards.base import Reward, RewardSet
from rlflow.rewards.colour import redness
from rlflow.rewards.remote.client import Remote
from rlflow.rewards.remote.wire import answer, unpack

# -- a server that lies ---------------------------------------------------------------------------

PROMPTS = ["truth", "truth", "lie", "lie", "lie", "lie", "truth"]
"""Of rows that are asked for in pairs."""
LIE = torch.tensor([prompt == "lie" for prompt in PROMPTS])
WRONG = 77.0
"""A score that is nobody's."""
MAX_ANSWER = 2**16


def http(content: bytes, status: int | str = 200, *headers: str, length: int | str | None = None) -> bytes:
    """An answer, whole or not as `length` says."""
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(content) if length is None else length}", *headers]
    return "\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1") + content


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Iterable[bytes]]:
    """A lie that is 200 and, as JSON or bytes, what `change` makes of the right answer with wrong scores."""

    def lie(said: dict[str, Any]) -> Iterable[bytes]:
        new = change(said)
        yield http(new if isinstance(new, bytes) else json.dumps(new).encode())

    return lie


def raw(make: Callable[[bytes], bytes]) -> Callable[[dict[str, Any]], Iterable[bytes]]:
    """A lie of these bytes, given the JSON of an answer with wrong scores."""
    return lambda said: [make(json.dumps(said).encode())]


def slowly(content: Callable[[bytes], bytes]) -> Callable[[dict[str, Any]], Iterable[bytes]]:
    """A letter now and then."""
    return lambda said: (bytes([letter]) for letter in content(json.dumps(said).encode()))


def endless(said: dict[str, Any]) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 X\r\nconnection: close\r\n\r\n"
    for _ in range(200):
        yield b" " * 2**12


def to(place: str) -> str:
    return f"location: {place}"


LIES: dict[str, Callable[[dict[str, Any]], Iterable[bytes]]] = {
    "too few": changed(lambda said: said | {"scores": said["scores"][1:]}),
    "too many": changed(lambda said: said | {"scores": [*said["scores"], 1.0]}),
    "none": changed(lambda said: said | {"scores": []}),
    "no scores": changed(lambda said: {"id": said["id"]}),
    "scores by row": changed(lambda said: said | {"scores": dict(enumerate(said["scores"]))}),
    "one score": changed(lambda said: said | {"scores": WRONG}),
    "nan": changed(lambda said: json.dumps(said).replace("77.0", "NaN").encode()),
    "infinity": changed(lambda said: json.dumps(said).replace("77.0", "-Infinity").encode()),
    "1e999": changed(lambda said: json.dumps(said).replace("77.0", "1e999").encode()),
    "1e300": changed(lambda said: json.dumps(said).replace("77.0", "1e300").encode()),
    "a number of 400 digits": changed(lambda said: json.dumps(said).replace("77.0", "9" * 400).encode()),
    "a number of 5000 digits": changed(lambda said: json.dumps(said).replace("77.0", "9" * 5000).encode()),
    "texts": changed(lambda said: said | {"scores": ["77.0"] * len(said["scores"])}),
    "truths": changed(lambda said: said | {"scores": [True] * len(said["scores"])}),
    "nested": changed(lambda said: said | {"scores": [[WRONG]] * len(said["scores"])}),
    "tables": changed(lambda said: said | {"scores": [{"score": WRONG}] * len(said["scores"])}),
    "of another batch": changed(lambda said: said | {"id": "0" * 32}),
    "of no batch": changed(lambda said: {"scores": said["scores"]}),
    "id in a list": changed(lambda said: said | {"id": [said["id"]]}),
    "scores twice": changed(lambda said: json.dumps(said)[:-1].encode() + b', "scores": [77.0, 77.0]}'),
    "two answers in one": changed(lambda said: json.dumps(said).encode() * 2),
    "a list": changed(lambda said: said["scores"]),
    "null": changed(lambda said: None),
    "html": changed(lambda said: b"<html><body>502 Bad Gateway</body></html>"),
    "empty": changed(lambda said: b""),
    "half of the JSON": changed(lambda said: json.dumps(said).encode()[:-5]),
    "not UTF-8": changed(lambda said: b"\xff\xfe\xfd" + json.dumps(said).encode()),
    "deep": changed(lambda said: b"[" * 50_000),
    "pickle": changed(pickle.dumps),
    "safetensors": changed(lambda said: save({"scores": torch.tensor(said["scores"])})),
    "half of safetensors": changed(lambda said: save({"scores": torch.tensor(said["scores"])})[:-3]),
    "huge": changed(lambda said: json.dumps(said).encode() + b" " * 2**20),
    "endless": endless,
    "zipped": raw(lambda said: http(gzip.compress(said), 200, "content-encoding: gzip")),
    "a bomb": raw(lambda said: http(gzip.compress(bytes(2**24)), 200, "content-encoding: gzip")),
    "longer than said": raw(lambda said: http(said, length=len(said) - 4)),
    "shorter than said": raw(lambda said: http(said, length=len(said) + 4)),
    "length below zero": raw(lambda said: http(said, length=-5)),
    "length in words": raw(lambda said: http(said, length="many")),
    "two lengths": raw(lambda said: http(said, 200, "content-length: 3")),
    "chunks of no number": raw(lambda said: http(said, 200, "transfer-encoding: chunked")),
    "a chunk without end": raw(
        lambda said: b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(said), said)
    ),
    "letter by letter": slowly(http),
    "body letter by letter": lambda said: [http(b"", length=500), *slowly(lambda content: content)(said)],
    "silence": lambda said: (b"" for _ in range(200)),
    "a closed door": lambda said: [],
    "half of a head": raw(lambda said: http(said)[:20]),
    "no HTTP": raw(lambda said: said),
    "no length, and not whole": raw(lambda said: b"HTTP/9.9 200 OK\r\n\r\n" + said[:-3]),
    "a long head": raw(lambda said: http(said, 200, "x: " + "y" * 2**20)),
    "many heads": raw(lambda said: http(said, 200, *(f"x{i}: y" for i in range(20_000)))),
    "wait for ever": lambda said: [b"HTTP/1.1 100 Continue\r\n\r\n"] * 100 + [b""] * 200,
    **{f"status {n}": raw(lambda said, n=n: http(said, n)) for n in (201, 202, 206, 400, 404, 429, 500, 503, 999)},
    **{f"moved {n}": raw(lambda said, n=n: http(said, n, to("/score"))) for n in (300, 301, 302, 303, 307, 308)},
    "moved away": raw(lambda said: http(said, 307, to("http://127.0.0.1:9/score"))),
}


def read_request(connection: socket.socket) -> tuple[bytes, bytes]:
    """First line and body."""
    said = b""
    while b"\r\n\r\n" not in said and (part := connection.recv(2**16)):
        said += part
    head, _, body = said.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while lengths and len(body) < int(lengths[0]) and (part := connection.recv(2**16)):
        body += part
    return head.split(b"\r\n")[0], body


class Liar:
    """Answers requests for honest rows as it should, and those for the others as `lie` says."""

    def __init__(self) -> None:
        self.lie: Callable[[dict[str, Any]], Iterable[bytes]] = lambda said: []
        self.lied, self.done = 0, threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self.done.is_set():
            try:
                connection, _ = self.listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(5)
        try:
            with connection:
                for part in self._answer(*read_request(connection)):
                    connection.sendall(part)
                    if len(part) <= 1 and self.done.wait(0.02):
                        return
        except OSError:  # they went away
            return

    def _answer(self, line: bytes, body: bytes) -> Iterable[bytes]:
        if line.startswith(b"GET"):
            return [http(json.dumps({"protocol": 1, "columns": ["images", "prompt"]}).encode())]
        batch = unpack(body)
        if "lie" not in batch.columns["prompt"]:
            return [http(json.dumps(answer(batch, truth(batch.columns["images"]))).encode())]
        self.lied += 1
        return self.lie(answer(batch, torch.full((batch.rows,), WRONG)))


def truth(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0, 0, 0]


@pytest.fixture(scope="module")
def liar() -> Iterator[tuple[Liar, Remote]]:
    server = Liar()
    patience = {"request_s": 0.5, "total_s": 4.0, "tries": 1, "parallel": 4, "failures": 10**6}
    yield server, Remote(server.url, rows=2, **patience)
    server.done.set()
    server.listener.close()


@pytest.mark.parametrize("name", LIES)
def test_no_lie_becomes_a_score(name: str, liar: tuple[Liar, Remote], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that were lied about are masked and counted, the others right, in their places."""
    monkeypatch.setattr("rlflow.rewards.remote.ask.MAX_ANSWER", MAX_ANSWER)
    server, remote = liar
    server.lie, before = LIES[name], server.lied
    images = torch.arange(7).view(7, 1, 1, 1).expand(7, 3, 2, 2) / 255
    rewards = RewardSet([Reward("r", remote)])
    scores = rewards.compute({"images": images, "prompt": PROMPTS}, 7)["r"]
    assert server.lied - before == 2
    assert scores[LIE].isnan().all()
    assert rewards.masked["r"] == 4
    assert "2 of 4 requests have no answer" in rewards.last_error["r"]
    torch.testing.assert_close(scores[~LIE], truth(images)[~LIE])


def test_there_are_enough_lies() -> None:
    assert len(LIES) >= 60


# -- strangers at our server ----------------------------------------------------------------------

MOST = 100
HEAD = b"POST /score HTTP/1.1\r\nhost: h\r\n"
STRANGERS: dict[str, bytes] = {
    "idle": b"",
    "a letter": b"P",
    "half a head": HEAD,
    "half a body": HEAD + b"content-length: 5000\r\n\r\nabc",
    "a body that is too long": HEAD + b"content-length: 99999999999\r\n\r\nabc",
    "chunks": HEAD + b"transfer-encoding: chunked\r\n\r\nffffff\r\nabc",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00" * 20,
    "a long head": HEAD + b"x: " + b"y" * 2**17,
    "no batch": HEAD + b"content-length: 3\r\n\r\nabc",
    "many requests": b"GET /health HTTP/1.1\r\nhost: h\r\n\r\n" * 50,
}


@pytest.fixture(scope="module")
def few_handles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Our server as a user starts it, with 64 handles: its address and what it says on the error stream."""
    log = tmp_path_factory.mktemp("server") / "err"
    command = f'ulimit -n 64; exec "{sys.executable}" -m rlflow serve-reward redness --port 0'
    with log.open("wb") as err:
        server = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, stderr=err, text=True)
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        assert said.startswith("redness (columns images) on http://127.0.0.1:"), log.read_text()
        yield said.split()[-1], log
        assert server.poll() is None, "it lives"
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) in (0, -signal.SIGTERM)
    finally:
        server.kill()


@pytest.mark.slow
def test_who_asks_honestly_is_served_among_strangers(few_handles: tuple[str, Path]) -> None:
    url, log = few_handles
    address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
    images = torch.randint(0, 256, (8, 3, 4, 4)) / 255
    rewards = RewardSet([Reward("r", Remote(url, rows=2, wait_s=20.0))])
    strangers: list[socket.socket] = []
    try:
        for said in STRANGERS.values():
            for _ in range(MOST // 3):
                strangers.append(connection := socket.create_connection(address, timeout=10))
                try:
                    connection.sendall(said)
                except OSError:  # turned away
                    continue
            for old in strangers[:-MOST]:
                old.close()
            del strangers[:-MOST]
            scores = rewards.compute({"images": images}, 8)["r"]
            torch.testing.assert_close(scores, redness(images), atol=1e-6, rtol=0)
    finally:
        for connection in strangers:
            connection.close()
    assert rewards.errors["r"] == 0
    assert log.read_text() == ""
