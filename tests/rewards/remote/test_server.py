"""The reward server: what it refuses, whom it turns away, and the command that starts it."""

import json
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
import httpx2
from safetensors.torch import save

from rlflow import cli
from rlflow.rewards.base import Reward, RewardSet
from rlflow.rewards.jpeg import jpeg_compressibility
from rlflow.rewards.remote.client import Remote
from rlflow.rewards.remote.door import BUSY
from rlflow.rewards.remote.server import Service, check_open, listen
from rlflow.rewards.remote.wire import Batch, pack
from rlflow.rewards.scores import SomeRows

Served = Callable[..., Any]
QUICK = {"request_s": 2.0, "total_s": 4.0, "tries": 2, "backoff_s": 0.01, "wait_s": 10.0}
IMAGES = torch.arange(7 * 3 * 4 * 4).view(7, 3, 4, 4).float() / 400


def first_pixel(images: Tensor, prompt: Sequence[str]) -> Tensor:
    """The first pixel plus the prompt's length."""
    return images[:, 0, 0, 0] + torch.tensor([len(text) for text in prompt])


def compute(fn: Callable[..., Any]) -> tuple[Tensor, RewardSet]:
    rewards = RewardSet([Reward("r", fn)])
    columns = {"images": IMAGES, "prompt": ["a"] * 7}
    return rewards.compute({n: columns[n] for n in rewards.columns}, 7)["r"], rewards


# -- what a server refuses ------------------------------------------------------------------------


class Bomb:
    """Leaves a mark when it is unpickled."""

    mark = ""

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.mark),)


def test_a_server_takes_nothing_but_batches(served: Served, tmp_path: Path) -> None:
    Bomb.mark = str(tmp_path / "ran")
    good = pack(Batch("a", 2, {"images": torch.rand(2, 3, 4, 4), "prompt": ["a", "b"]}))
    with served(first_pixel, max_bytes=len(good) + 100) as (url, service, _):
        Remote(url, wait_s=10.0)

        def post(content: Any, **headers: str) -> tuple[int, str]:
            said = httpx2.post(f"{url}/score", content=content, headers=headers)
            return said.status_code, said.text

        assert post(good)[0] == 200
        assert post(pickle.dumps(Bomb()))[0] == 400
        assert not (tmp_path / "ran").exists()
        assert post(good[:-7])[0] == 400
        assert post(b"")[0] == 400
        assert post(pack(Batch("a", 2, {"prompt": ["a", "b"]}))) == (
            400,
            json.dumps({"error": "the reward reads ['images', 'prompt'], the request lacks ['images']"}),
        )
        assert post(pack(Batch("a", 3, {"images": torch.rand(2, 3, 4, 4), "prompt": ["a", "b"]})))[0] == 400
        assert post(good + b" " * 200)[0] == 413
        assert post(iter([good, b" " * 200]))[0] == 413, "without a declared length too"
        assert httpx2.get(f"{url}/score").status_code == 405
        assert service.rows == 2


def test_the_token_is_asked_for_and_said_to_nobody(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with served(first_pixel, token="s3cret") as (url, service, _):
        monkeypatch.delenv("RLFLOW_REWARD_TOKEN", raising=False)
        without = Remote(url, **QUICK)
        scores, rewards = compute(without)
        assert scores.isnan().all()
        assert "401" in rewards.last_error["r"]
        assert service.rows == 0
        monkeypatch.setenv("RLFLOW_REWARD_TOKEN", "s3cret")
        assert compute(Remote(url, **QUICK))[0][0].isfinite()
        monkeypatch.setenv("OTHER", "wr0ng")
        scores, rewards = compute(Remote(url, token_env="OTHER", **QUICK))
        assert scores.isnan().all()
        said = caplog.text + str(rewards.last_error)
    assert "s3cret" not in said
    assert "wr0ng" not in said


def test_only_this_machine_is_served_without_a_token() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        check_open(host, None, "T")
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ValueError, match=rf"--host {host} is open to others: set the environment variable T"):
            check_open(host, None, "T")
        check_open(host, "token", "T")


def test_too_many_waiting_batches_are_sent_away(served: Served) -> None:
    hold, asked = threading.Event(), threading.Event()

    def waits(prompt: list[str]) -> list[float]:
        asked.set()
        hold.wait(10)
        return [1.0] * len(prompt)

    content = pack(Batch("a", 1, {"prompt": ["a"]}))
    with served(waits, max_waiting=1) as (url, _, _), ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx2.post, f"{url}/score", content=content, timeout=20)
        assert asked.wait(10)
        assert httpx2.post(f"{url}/score", content=content).status_code == 503
        hold.set()
        assert first.result(20).status_code == 200


def test_half_a_body_is_not_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sends no more is told so, and the next one is served."""
    monkeypatch.setattr("rlflow.rewards.remote.server.UPLOAD_S", 0.2)
    content = pack(Batch("a", 1, {"prompt": ["a"]}))
    with served(lambda prompt: [1.0] * len(prompt)) as (url, service, _):
        Remote(url, wait_s=10.0)
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        with socket.create_connection(address, timeout=10) as slow:
            slow.sendall(b"POST /score HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(content))
            slow.sendall(content[: len(content) // 2])
            said = slow.recv(2**16)
            while not said.endswith(b"}") and (more := slow.recv(2**16)):  # head and body may come apart
                said += more
        assert said.startswith(b"HTTP/1.1 408 "), said
        assert b"more than 0.2 s to arrive" in said
        assert service.rows == 0
        assert httpx2.post(f"{url}/score", content=content).status_code == 200


def test_a_reward_that_takes_too_long_is_said(served: Served) -> None:
    with served(lambda prompt: time.sleep(1.0), timeout_s=0.05) as (url, _, _):
        Remote(url, wait_s=10.0)
        assert httpx2.post(f"{url}/score", content=pack(Batch("a", 1, {"prompt": ["a"]}))).status_code == 504


def test_columns_that_cannot_be_are_told_so_and_reach_no_reward(served: Served) -> None:
    """400 whatever is wrong with them; what the annotations of the reward say counts too."""
    reached: list[int] = []

    def reward(
        images: Tensor, prompt: Sequence[str], group: Tensor, text: Sequence[str], include: Sequence[dict[str, int]]
    ) -> Tensor:
        reached.append(len(prompt))
        return images[:, 0, 0, 0]

    tensors = {"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "group": torch.arange(2)}
    lists = {"prompt": ["a", "b"], "text": ["x", "y"], "include": [{"a": 1}, {}]}

    def content(
        tensors: dict[str, Tensor] = tensors, lists: dict[str, Any] = lists, said: dict[str, Any] | None = None
    ) -> bytes:
        words = json.dumps({"id": "a", "rows": 2, "columns": lists} | (said or {})).encode()
        return save(tensors | {"json": torch.frombuffer(bytearray(words), dtype=torch.uint8)})

    wrong = [
        *(content(tensors | {"images": torch.zeros(shape, dtype=torch.uint8)}) for shape in WRONG_SHAPES),
        *(content(tensors | {"images": torch.zeros(2, 3, 4, 4, dtype=dtype)}) for dtype in (torch.float32, torch.bool)),
        *(content(tensors | {"group": g}) for g in (torch.ones(2), torch.ones(2, 1).long(), torch.tensor(1))),
        content({"group": tensors["group"]}, lists | {"images": [[0], [0]]}),
        content({"images": tensors["images"]}, lists | {"group": [0, 1]}),
        content(tensors | {"prompt": torch.arange(2)}, {"text": ["x", "y"], "include": [{}, {}]}),
        content(tensors, lists | {"group": [0, 1]}),
        *(content(lists=lists | {"prompt": p}) for p in (["a"], "ab", ["a", 1], ["a", None], {"0": "a"}, None)),
        *(content(lists=lists | {"text": t}) for t in (["a", 1], ["a", None], ["a", ["b"]], ["a", "\ud800"])),
        *(content(lists=lists | {"include": i}) for i in ([{}, 1], [{}, {"a": "b"}], ["a", "b"])),
        *(content(said={"rows": rows}) for rows in (0, -1, 3, True, 2.0, "2", None, 10**30)),
        *(content(said={"id": name}) for name in (None, 1, "a" * 65, "\udcff")),
        *(content(said={"columns": columns}) for columns in (None, [], "a")),
        save(tensors),
        save(tensors | {"json": torch.zeros(3, dtype=torch.bfloat16)}),
        save(tensors | {"json": torch.full((2, 2), 255, dtype=torch.uint8)}),
    ]
    with served(reward) as (url, service, _), httpx2.Client() as client:
        for number, body in enumerate(wrong):
            said = client.post(f"{url}/score", content=body)
            assert said.status_code == 400, (number, said.text)
            assert said.json()["error"]
        assert client.post(f"{url}/score", content=content()).status_code == 200
        assert service.errors == 0
    assert reached == [2]


WRONG_SHAPES = [(2, 4, 4, 3), (2, 1, 4, 4), (2, 3, 4), (2,), (2, 3, 0, 4), (1, 3, 4, 4), (0, 3, 4, 4)]


@pytest.mark.filterwarnings("ignore")  # workers of pytest cannot hand such a warning on
def test_an_error_is_told_whatever_its_words_hold(served: Served) -> None:
    def fails(prompt: Sequence[str]) -> None:
        raise ValueError("half a letter \udcff, \x00")

    with served(fails) as (url, _, _):
        said = httpx2.post(f"{url}/score", content=pack(Batch("a", 1, {"prompt": ["a"]})))
    assert said.status_code == 500
    assert "half a letter" in said.json()["error"]


def test_a_served_reward_that_scores_some_rows_says_which(served: Served) -> None:
    def some(prompt: Sequence[str]) -> None:
        raise SomeRows([1.0, None] + [2.0] * 5, "one of them is dark")

    with served(some) as (url, service, _):
        scores, rewards = compute(Remote(url, **QUICK))
    assert scores.isnan().tolist() == [False, True] + [False] * 5
    assert (service.errors, rewards.errors["r"]) == (1, 0)


# -- whom it turns away ---------------------------------------------------------------------------


def visitor(url: str, said: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=10)
    connection.sendall(said)
    return connection


def ended(connection: socket.socket) -> bytes:
    """What a connection still says before the other side ends it."""
    said = b""
    try:
        while part := connection.recv(2**16):
            said += part
    except ConnectionResetError:
        pass
    return said


HALF_A_HEAD = b"POST /score HTTP/1.1\r\nHost: h\r\n"
HALF_A_BODY = HALF_A_HEAD + b"Content-Length: 1000\r\n\r\nabc"


def brief(prompt: Sequence[str]) -> list[float]:
    return [1.0] * len(prompt)


@pytest.mark.parametrize("said", [b"", b"P", HALF_A_HEAD], ids=["nothing", "a letter", "half a head"])
def test_who_does_not_say_what_they_want_is_not_waited_for(
    served: Served, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr("rlflow.rewards.remote.door.HEAD_S", 0.2)
    with served(brief) as (url, _, _), visitor(url, said) as slow:
        assert ended(slow) == b""


def test_a_connection_that_is_kept_is_not_kept_for_ever(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a letter now and then either."""
    monkeypatch.setattr("rlflow.rewards.remote.door.HEAD_S", 0.3)
    with served(brief) as (url, _, _), visitor(url, b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n") as slow:
        slow.recv(2**16)
        slow.sendall(b"G")
        assert b"HTTP" not in ended(slow)


@pytest.mark.parametrize("said", [b"", HALF_A_HEAD, HALF_A_BODY], ids=["nothing", "half a head", "half a body"])
def test_strangers_who_fill_the_room_go_first(served: Served, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    """And a client of ours is served, with no retry."""
    monkeypatch.setattr("rlflow.rewards.remote.door.MOST_CONNECTIONS", 8)
    with served(brief) as (url, _, server):
        strangers = []
        content = pack(Batch("a", 1, {"prompt": ["a"]}))
        ask = HALF_A_HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content
        for _ in range(20):
            strangers.append(visitor(url, said))
            with visitor(url, ask) as ours:
                assert ended(ours).endswith(b'{"id": "a", "scores": [1.0]}')
            assert len(server.server_state.connections) <= 8 + 1, "one that goes may be there still"
        for connection in strangers[:12]:
            assert ended(connection) in (b"", BUSY)
        for connection in strangers:
            connection.close()


def test_bytes_that_fill_the_room_make_the_oldest_upload_go(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlflow.rewards.remote.door.MOST_BYTES", 5000)
    content = pack(Batch("a", 1, {"prompt": ["a" * 1500]}))
    half = HALF_A_HEAD + b"Content-Length: 4000\r\n\r\n" + b"a" * 2000
    with served(brief) as (url, service, _), visitor(url, half) as first, visitor(url, half) as second:
        assert httpx2.post(f"{url}/score", content=content).status_code == 200
        assert ended(first) == BUSY
        second.sendall(b"a" * 2000)
        assert b" 400 " in second.recv(2**16), "it had time to end"
        assert service.rows == 1


def test_uploads_that_are_broken_off_are_quiet(
    served: Served, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with served(brief) as (url, service, _):
        for said in (b"", b"\x16\x03\x01", b"GET", HALF_A_HEAD, HALF_A_BODY, b"\r\n" * 50, b"a" * 2**17):
            for how in (socket.SHUT_WR, socket.SHUT_RDWR):
                with visitor(url, said) as connection:
                    connection.shutdown(how)
        assert compute(Remote(url, **QUICK))[0].tolist() == [1.0] * 7
        assert service.rows == 7
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert capfd.readouterr().err == "", "nor by the web server's own log"


def test_a_port_that_is_taken_is_said_before_the_address() -> None:
    """Two that only bound it would both have been told that it is theirs."""
    _, first = listen(Service("r", brief), "127.0.0.1", 0)
    with first:
        port = first.getsockname()[1]
        with visitor(f"http://127.0.0.1:{port}"):  # it listens before it is run
            pass
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen(Service("r", brief), "127.0.0.1", port)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e-300"])
def test_a_time_limit_that_cannot_be_kept_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve-reward", "redness", "--port", "0", "--timeout", seconds])
    assert "error: argument --timeout: must be " in capsys.readouterr().err


# -- the command ----------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_told_to_end() -> None:
    """As a user starts it: the address is printed, settings count, SIGTERM ends it without an error."""
    words = [sys.executable, "-m", "rlflow", "serve-reward", "jpeg_compressibility", "quality=10", "--port", "0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        assert said.startswith("jpeg_compressibility (columns images) on http://127.0.0.1:")
        there, _ = compute(Remote(said.split()[-1], wait_s=20.0))
        assert torch.allclose(there, jpeg_compressibility(IMAGES, 10))
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) in (0, -signal.SIGTERM)
        assert "Traceback" not in server.stderr.read()  # type: ignore[union-attr]
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("redness", "--host", "0.0.0.0"), "--host 0.0.0.0 is open to others"),
        (("rednes",), "unknown reward 'rednes'; did you mean 'redness'?"),
        (("jpeg_compressibility", "quality=high"), "jpeg_compressibility.quality: Input should be a valid integer"),
        (("my:code",), "--trust-code"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RLFLOW_REWARD_TOKEN", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main(["serve-reward", *words, "--port", "0"])
    assert end.value.code == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_port_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["serve-reward", "redness", "--port", "99999"])
    assert end.value.code == 2
    assert "error: argument --port: must be in [0, 65535], got 99999" in capsys.readouterr().err
