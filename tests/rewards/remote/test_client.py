"""Rewards on a server: the same scores as here, and whatever a dead, slow or lying server does costs only its own rows."""

import asyncio
import json
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
import httpx2

from rlflow.rewards.base import Reward, RewardSet, to_uint8
from rlflow.rewards.component import make_reward
from rlflow.rewards.remote.ask import Asker, NoAnswer, Patience, Request, check_url, parse_json
from rlflow.rewards.remote.breaker import Breaker
from rlflow.rewards.remote.client import Remote
from rlflow.rewards.remote.wire import TYPE, Batch, answer, pack, read_answer, unpack

Served = Callable[..., Any]
QUICK = {"request_s": 2.0, "total_s": 4.0, "tries": 2, "backoff_s": 0.01, "wait_s": 0.0}
IMAGES = torch.arange(7 * 3 * 4 * 4).view(7, 3, 4, 4).float() / 400  # not on the 8-bit grid
PROMPTS = [f'say "{i}"\n' for i in range(7)]


def first_pixel(images: Tensor, prompt: list[str]) -> list[float | None]:
    """The first pixel plus the prompt's length; no score for row 5."""
    return [None if '"5"' in p else float(i[0, 0, 0]) + len(p) for i, p in zip(images, prompt, strict=True)]


def compute(fn: Callable[..., Any], images: Tensor = IMAGES) -> tuple[Tensor, RewardSet]:
    rewards = RewardSet([Reward("r", fn)])
    columns = {"images": images, "prompt": PROMPTS[: len(images)], "group": torch.arange(len(images)) // 4}
    return rewards.compute({n: columns[n] for n in rewards.columns}, len(images))["r"], rewards


def test_what_is_no_reward_server_is_not_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has answered: a path that is not there stays so, and nobody sleeps before asking again."""
    pauses: list[float] = []
    with served(first_pixel) as (url, _, _):
        monkeypatch.setattr(
            "rlflow.rewards.remote.client.time", SimpleNamespace(monotonic=time.monotonic, sleep=pauses.append)
        )
        with pytest.raises(ValueError, match="no reward server at .*/elsewhere .status 404"):
            Remote(f"{url}/elsewhere", wait_s=10.0)
    assert not pauses


# -- the way it is meant --------------------------------------------------------------------------


def test_a_served_reward_scores_as_here_in_order_and_in_parts(served: Served) -> None:
    """On pictures of 8 bits, which is what a reward judges; a row without a score stays without one."""
    eight_bits = torch.from_numpy(to_uint8(IMAGES)).permute(0, 3, 1, 2).float() / 255
    here, _ = compute(first_pixel, eight_bits)
    with served(first_pixel, max_waiting=64) as (url, service, _):
        for rows in (1, 3, 7, 100):
            there, rewards = compute(Remote(url, rows=rows, wait_s=10.0))
            assert torch.allclose(there, here, equal_nan=True)
            assert there.isnan().tolist() == [False] * 5 + [True, False]
            assert rewards.errors["r"] == 0
        assert service.rows == 4 * 7


def test_a_reward_of_groups_gets_its_batch_whole(served: Served) -> None:
    sizes = []

    def rank(images: Tensor, group: Tensor) -> Tensor:
        sizes.append(len(group))
        return group.float()

    with served(rank) as (url, _, _):
        scores, _ = compute(Remote(url, rows=1, wait_s=10.0))
    assert sizes == [7]
    assert scores.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_a_server_ends_after_the_batch_it_has(served: Served) -> None:
    asked, ended = threading.Event(), threading.Event()

    def slow(images: Tensor) -> Tensor:
        asked.set()
        ended.wait(10)
        return images[:, 0, 0, 0]

    with served(slow) as (url, _, server), ThreadPoolExecutor(1) as pool:
        remote = Remote(url, wait_s=10.0, tries=1)
        waiting = pool.submit(compute, remote)
        assert asked.wait(10)
        server.should_exit = True
        ended.set()
        assert waiting.result(20)[0].isfinite().all()


def test_an_error_of_the_reward_is_told_and_the_next_batch_is_scored(served: Served) -> None:
    calls = []

    def fails_first(prompt: list[str]) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("no such weight")
        return [1.0] * len(prompt)

    with served(fails_first) as (url, service, _):
        scores, rewards = compute(Remote(url, **QUICK | {"wait_s": 10.0, "tries": 1}))
        assert scores.isnan().all()
        assert "no such weight" in rewards.last_error["r"]
        assert httpx2.get(f"{url}/health").json()["errors"] == 1
        assert compute(Remote(url, wait_s=10.0))[0].tolist() == [1.0] * 7
        assert service.errors == 1


# -- servers that are wrong -----------------------------------------------------------------------


def lies(change: Callable[[dict[str, Any], Batch], Any]) -> Callable[[Any, Batch], None]:
    """A server that answers 200 with what `change` makes of the right answer."""

    def send(handler: Any, batch: Batch) -> None:
        said = change(answer(batch, torch.ones(batch.rows)), batch)
        handler.reply(200, said if isinstance(said, bytes) else json.dumps(said).encode())

    return send


def half(handler: Any, batch: Batch) -> None:
    handler.reply(200, json.dumps(answer(batch, torch.ones(batch.rows))).encode()[:-9], lost=9)


def drip(handler: Any, batch: Batch) -> None:
    """A byte now and then, for ever: each is in time."""
    handler.reply(200, b"{", lost=10**6)
    for _ in range(200):
        if handler.server.done.wait(0.05):
            return
        handler.wfile.write(b" ")
        handler.wfile.flush()


def hang_up(handler: Any, batch: Batch) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def silent(handler: Any, batch: Batch) -> None:
    handler.server.done.wait(10)


def moved(handler: Any, batch: Batch) -> None:
    handler.send_response(307)
    handler.send_header("location", "/elsewhere")
    handler.send_header("content-length", "0")
    handler.end_headers()


WRONG: dict[str, Callable[[Any, Batch], None]] = {
    "too few": lies(lambda said, _: said | {"scores": said["scores"][1:]}),
    "too many": lies(lambda said, _: said | {"scores": [*said["scores"], 1.0]}),
    "nan": lies(lambda said, _: json.dumps(said).replace("1.0", "NaN", 1).encode()),
    "infinite": lies(lambda said, _: json.dumps(said).replace("1.0", "1e999", 1).encode()),
    "text": lies(lambda said, _: said | {"scores": ["1.0"] * len(said["scores"])}),
    "truth": lies(lambda said, _: said | {"scores": [True] * len(said["scores"])}),
    "nested": lies(lambda said, _: said | {"scores": [[1.0]] * len(said["scores"])}),
    "of another batch": lies(lambda said, _: said | {"id": "0" * 32}),
    "no table": lies(lambda said, _: said["scores"]),
    "html": lies(lambda *_: b"<html><body>502 Bad Gateway</body></html>"),
    "empty": lies(lambda *_: b""),
    "deep": lies(lambda *_: b"[" * 100_000),
    "pickle": lies(lambda said, _: pickle.dumps(said)),
    "long": lies(lambda *_: b" " * (2**20)),
    "half": half,
    "drip": drip,
    "silent": silent,
    "moved": moved,
    "error": lambda handler, batch: handler.reply(500, b"oops"),
    "busy": lambda handler, batch: handler.reply(503, b"later"),
    "hangs up": hang_up,
}


class Handler(BaseHTTPRequestHandler):
    """/health as it should be, /score as the server's `behave` says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def reply(self, status: int, content: bytes, lost: int = 0) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content) + lost))
        self.send_header("connection", "close")  # said, or the client asks on a connection that is going away
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def do_GET(self) -> None:
        self.reply(200, json.dumps({"protocol": 1, "columns": ["images", "prompt"]}).encode())

    def do_POST(self) -> None:
        batch = unpack(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(batch)  # type: ignore[attr-defined]
        self.server.behave(self, batch)  # type: ignore[attr-defined]


@contextmanager
def wrong_server(behave: Callable[[Any, Batch], None]) -> Iterator[tuple[str, Any]]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.behave, server.done, server.asked, server.handle_error = behave, threading.Event(), [], lambda *_: None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.done.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_wrong_answer_masks_every_row_and_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlflow.rewards.remote.ask.MAX_ANSWER", 2**16)
    slow = name in ("drip", "silent")
    with wrong_server(WRONG[name]) as (url, server):
        remote = Remote(url, **QUICK | ({"request_s": 0.5, "tries": 1} if slow else {"request_s": 8.0}))
        scores, rewards = compute(remote)
        assert scores.isnan().all()
        assert rewards.errors["r"] == 1
        assert rewards.masked["r"] == 7
        assert "1 of 1 requests have no answer" in rewards.last_error["r"]
        if slow:
            assert "no answer within 0.5 s" in rewards.last_error["r"]
        else:
            assert len(server.asked) == (1 if name == "moved" else 2), "asked again where that may help"


def test_a_failed_request_costs_its_rows_alone() -> None:
    """The other rows keep their scores, in their places."""

    def behave(handler: Any, batch: Batch) -> None:
        bad = batch.columns["prompt"][0] == PROMPTS[3]
        scores = torch.tensor(batch.columns["images"][:, 0, 0, 0].tolist())
        handler.reply(500, b"") if bad else handler.reply(200, json.dumps(answer(batch, scores)).encode())

    with wrong_server(behave) as (url, _):
        scores, rewards = compute(Remote(url, rows=3, **QUICK))
    assert scores.isnan().tolist() == [False] * 3 + [True] * 3 + [False]
    right = torch.cat([IMAGES[:3, 0, 0, 0], IMAGES[6:, 0, 0, 0]])
    assert torch.allclose(scores[~scores.isnan()], right, atol=1 / 255)
    assert rewards.metrics()["reward/r/masked_frac"] == pytest.approx(3 / 7)
    assert rewards.errors["r"] == 1


def test_a_failing_server_is_asked_again_and_may_recover() -> None:
    answers = [WRONG["error"], WRONG["hangs up"], lies(lambda said, _: said)]
    with wrong_server(lambda handler, batch: answers.pop(0)(handler, batch)) as (url, _):
        scores, rewards = compute(Remote(url, **QUICK | {"tries": 3, "request_s": 8.0, "total_s": 20.0}))
    assert scores.tolist() == [1.0] * 7
    assert rewards.errors["r"] == 0


def test_a_dead_server_is_left_alone() -> None:
    with wrong_server(WRONG["error"]) as (url, server):
        remote = Remote(url, rows=1, failures=3, rest_s=1000.0, parallel=1, **QUICK)
        assert compute(remote)[0].isnan().all()
        assert len(server.asked) == 3
        _, rewards = compute(remote)
        assert len(server.asked) == 3, "not asked while it rests"
        assert "not asked, after 3 failures in a row" in rewards.last_error["r"]
    assert compute(remote)[0].isnan().all(), "nobody listens any more"


def test_a_missing_or_foreign_server_is_said_at_the_start() -> None:
    with pytest.raises(ValueError, match=r"no reward server at http://127\.0\.0\.1:9 .*rlflow serve-reward"):
        Remote("http://127.0.0.1:9", **QUICK)
    with wrong_server(WRONG["error"]) as (url, _):
        Handler_get = Handler.do_GET
        try:
            Handler.do_GET = lambda self: self.reply(200, b'{"status": "ok"}')  # type: ignore[method-assign]
            with pytest.raises(ValueError, match="is no reward server of this version"):
                Remote(url, **QUICK)
        finally:
            Handler.do_GET = Handler_get  # type: ignore[method-assign]


def test_a_thread_that_runs_an_event_loop_can_ask() -> None:
    """As that of a notebook does."""

    async def cell() -> None:
        with pytest.raises(ValueError, match="no reward server at"):
            Remote("http://127.0.0.1:9", **QUICK)

    asyncio.run(cell())


# -- the breaker ----------------------------------------------------------------------------------


def test_the_breaker_opens_rests_tries_once_and_closes() -> None:
    now = [0.0]
    breaker = Breaker(failures=2, rest_s=10.0, clock=lambda: now[0])
    breaker.failed()
    assert breaker.allows(), "one failure is not enough"
    breaker.succeeded()
    breaker.failed()
    assert breaker.allows(), "failures count in a row"
    breaker.failed()
    assert not breaker.allows()
    now[0] = 10.0
    assert breaker.allows(), "one trial after the rest"
    assert not breaker.allows(), "and one only"
    breaker.failed()
    now[0] = 19.0
    assert not breaker.allows(), "the rest begins anew"
    now[0] = 20.0
    assert breaker.allows()
    breaker.succeeded()
    assert breaker.allows()
    assert breaker.allows()


def test_a_trial_that_is_broken_off_does_not_keep_the_breaker_open() -> None:
    breaker = Breaker(failures=1, rest_s=0.0)
    breaker.failed()
    asker = Asker("http://127.0.0.1:9", None, Patience(1.0, 2.0, 1), breaker)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    asker._exchange = stop  # type: ignore[method-assign, assignment]
    batch = Batch("a", 1, {"prompt": ["x"]})
    with pytest.raises(KeyboardInterrupt):
        asker.ask([Request(pack(batch), TYPE, lambda v: v)])
    assert breaker.allows()


# -- the wire -------------------------------------------------------------------------------------


def test_columns_survive_the_wire() -> None:
    columns = {"prompt": ['ä \x00 "', ""], "group": torch.tensor([2**53 + 1, -1]), "obs": torch.randn(2, 3)}
    columns |= {"include": [[{"class": "cat", "count": 2}], []], "images": torch.rand(2, 3, 4, 6)}
    found = unpack(pack(Batch("id", 2, columns)))
    assert (found.id, found.rows) == ("id", 2)
    assert found.columns["prompt"] == columns["prompt"]
    assert found.columns["include"] == columns["include"]
    assert torch.equal(found.columns["group"], columns["group"])
    assert torch.equal(found.columns["obs"], columns["obs"])
    assert (found.columns["images"] - columns["images"]).abs().max() <= 0.5 / 255 + 1e-6
    scores = read_answer(found, json.loads(json.dumps(answer(found, torch.tensor([1.5, torch.nan])))))
    assert scores == [1.5, None]


def test_addresses_and_answers_are_checked() -> None:
    assert check_url("https://h:1/x/") == "https://h:1/x"
    for bad in ("h:1", "ftp://h", "http://"):
        with pytest.raises(ValueError, match="write http://HOST:PORT"):
            check_url(bad)
    with pytest.raises(ValueError, match="no password in it") as error:
        check_url("http://me:hush@h:1")
    assert "hush" not in str(error.value)
    for text in ("NaN", "[Infinity]", "", "{", "<html>"):
        with pytest.raises(ValueError, match="JSON"):
            parse_json(text)
    assert NoAnswer("x").final is False


TIMES = {
    "remote": ("request_s", "total_s", "backoff_s", "rest_s", "wait_s"),
    "vlm_judge": ("request_s", "total_s", "backoff_s", "rest_s"),
}
MAY_BE_ZERO = ("backoff_s", "rest_s", "wait_s")


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-300, 1e300, float("inf"), float("nan")])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in TIMES.items() for name in names])
def test_times_are_checked_before_anyone_is_asked(kind: str, name: str, seconds: float) -> None:
    if seconds == 0 and name in MAY_BE_ZERO:
        seconds = -0.5
    settings = {"url": "http://127.0.0.1:9"} | ({"model": "m"} if kind == "vlm_judge" else {"wait_s": 0.0})
    with pytest.raises(
        ValueError,
        match=rf"^reward\.settings\.{kind}\.{name}: must be (seconds from 0\.001 to 1e\+06|finite|at most 1e30), got ",
    ):
        make_reward(kind, {kind: settings | {name: seconds}})


@pytest.mark.parametrize(
    ("name", "value"), [("tries", 0), ("tries", 10**6), ("parallel", 0), ("failures", 0), ("rows", 0)]
)
def test_numbers_are_checked_before_anyone_is_asked(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^reward\.settings\.remote\.{name}: must be .*, got {value}$"):
        make_reward("remote", {"remote": {"url": "http://127.0.0.1:9", name: value}})


def test_a_token_that_no_header_carries_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ("hush\n", "hu sh", "h\u00fcsh"):
        monkeypatch.setenv("RLFLOW_REWARD_TOKEN", bad)
        with pytest.raises(ValueError, match="RLFLOW_REWARD_TOKEN holds a space") as error:
            Remote("http://127.0.0.1:9", wait_s=0.0)
        assert "sh" not in str(error.value).removeprefix("RLFLOW_REWARD_TOKEN holds a space, a line break or")
