"""Ask a server that may be dead, slow or wrong: JSON answers within a time, or the reason why there is none.

One try lasts at most `request_s` from the first byte to the last, all tries of a call `total_s`; a busy or failing
server is asked again after backoff_s, twice that, ... with jitter, and left alone if it fails too often (breaker.py).
An answer counts only if it is status 200, JSON, not too long, and what the asker's own `read` accepts.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import random
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import urlsplit

from rlflow.registry import SettingError
from rlflow.rewards.calls import check_seconds
from rlflow.rewards.remote.breaker import Breaker

log = logging.getLogger(__name__)

ASK_AGAIN = (408, 425, 429)
"""Besides 5xx: the request was not at fault."""
MAX_ANSWER = 16 * 2**20
MOST = 1000
"""Tries of a request, requests at the same time."""


class NoAnswer(Exception):
    """Why a request has no answer; `final` when asking again is useless."""

    def __init__(self, reason: str, final: bool = False):
        super().__init__(reason)
        self.final = final


@dataclass(frozen=True)
class Request:
    """A body to POST, and what makes a value of the parsed answer (ValueError: the answer is wrong)."""

    content: bytes
    content_type: str
    read: Callable[[Any], Any]


@dataclass(frozen=True)
class Patience:
    """Seconds for one try and for all, tries, seconds before the second try, requests at the same time."""

    request_s: float = 20.0
    total_s: float = 50.0
    tries: int = 3
    backoff_s: float = 0.5
    parallel: int = 4

    def __post_init__(self) -> None:
        for name, allows_none in (("request_s", False), ("total_s", False), ("backoff_s", True)):
            check_seconds(name, getattr(self, name), allows_none)
        for name in ("tries", "parallel"):
            if not 1 <= getattr(self, name) <= MOST:
                raise SettingError(name, f"must be from 1 to {MOST}, got {getattr(self, name)}")


def is_loopback(host: str | None) -> bool:
    """Whether a name or address means this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def check_url(url: str) -> str:
    """`url` without a slash at its end; ValueError unless it is http(s)://HOST..., without a password in it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingError("url", f"{url!r} is no address: write http://HOST:PORT or https://...")
    if parts.username or parts.password:
        raise SettingError(
            "url", "a recipe is saved with its run, so no password in it: put a token into the environment"
        )
    return url.rstrip("/")


def find_token(variable: str) -> str | None:
    """The token in an environment variable, None without one; ValueError, which does not show it, if none can be so."""
    token = os.environ.get(variable) or None
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(f"{variable} holds a space, a line break or another character that no token has")
    return token


def read_token(variable: str, url: str) -> str | None:
    """The token to send to `url`, if there is one. It is sent as it is, so only https hides it."""
    token = find_token(variable)
    parts = urlsplit(url)
    if token and parts.scheme == "http" and not is_loopback(parts.hostname):
        log.warning("%s goes to %s readable for the network between: use https", variable, parts.hostname)
    return token


def need_httpx() -> Any:
    """The HTTP client's module; ImportError that names the extra."""
    try:
        import httpx2
    except ImportError:
        raise ImportError("asking a server needs httpx2: pip install 'rlflow-torch[remote]'") from None
    return httpx2


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands twice")
    return table


def parse_json(content: bytes | str) -> Any:
    """Strict JSON: no NaN, no Infinity, no name twice; ValueError with the beginning of what it was instead."""
    try:
        return json.loads(content, parse_constant=_refuse, object_pairs_hook=_table)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): {content[:60]!r}") from None


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` returns; from another thread where the caller's runs an event loop already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


class Asker:
    """POSTs requests to one URL; `token` goes into the Authorization header and nowhere else."""

    def __init__(self, url: str, token: str | None, patience: Patience, breaker: Breaker):
        self.httpx = need_httpx()
        self.url, self.patience, self.breaker = url, patience, breaker
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._trust_env = not is_loopback(urlsplit(url).hostname)  # proxies of the environment
        self._certificates = self.httpx.create_ssl_context(trust_env=self._trust_env)  # a tenth of a second each

    def ask(self, requests: Sequence[Request]) -> list[Any]:
        """The answer of each request, in order; in its place a NoAnswer where there is none."""
        return _run(self._all(requests))

    def get(self, path: str, seconds: float) -> Any:
        """The JSON at `path` below the URL; NoAnswer without it."""
        return _run(self._get(path, seconds))

    async def _get(self, path: str, seconds: float) -> Any:
        async with self._client() as client:
            return await self._within(seconds, client, client.build_request("GET", self.url + path), lambda v: v)

    def _client(self) -> Any:
        # the time of a whole try is limited here: the client's own limits begin anew with every byte
        return self.httpx.AsyncClient(
            timeout=None,
            headers={"accept-encoding": "identity"} | self._headers,
            trust_env=self._trust_env,
            verify=self._certificates,
        )

    async def _all(self, requests: Sequence[Request]) -> list[Any]:
        gate = asyncio.Semaphore(self.patience.parallel)
        end = asyncio.get_running_loop().time() + self.patience.total_s
        async with self._client() as client:
            return await asyncio.gather(*(self._one(client, gate, end, request) for request in requests))

    async def _one(self, client: Any, gate: asyncio.Semaphore, end: float, request: Request) -> Any:
        failure = NoAnswer(f"no time left of {self.patience.total_s:g} s")
        for attempt in range(self.patience.tries):
            left = end - asyncio.get_running_loop().time()
            if attempt:
                pause = self.patience.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1)
                await asyncio.sleep(max(0.0, min(pause, left)))
            async with gate:
                left = end - asyncio.get_running_loop().time()
                if left <= 0:
                    return failure
                if not self.breaker.allows():
                    return NoAnswer(f"not asked, after {self.breaker.in_a_row} failures in a row")
                try:
                    return await self._try(client, request, min(self.patience.request_s, left))
                except NoAnswer as error:
                    failure = error
            if failure.final:
                break
        return failure

    async def _try(self, client: Any, request: Request, seconds: float) -> Any:
        headers = {"content-type": request.content_type}
        built = client.build_request("POST", self.url, content=request.content, headers=headers)
        try:
            value = await self._within(seconds, client, built, request.read)
        except BaseException:  # cancelled too: the trial of a half open breaker must not stay out
            self.breaker.failed()
            raise
        self.breaker.succeeded()
        return value

    async def _within(self, seconds: float, client: Any, built: Any, read: Callable[[Any], Any]) -> Any:
        try:
            async with asyncio.timeout(seconds):
                content = await self._exchange(client, built)
            return read(parse_json(content))
        except TimeoutError:
            raise NoAnswer(f"no answer within {seconds:.3g} s") from None
        except self.httpx.HTTPError as error:
            raise NoAnswer(f"{type(error).__name__}: {error}") from None
        except ValueError as error:
            raise NoAnswer(f"a wrong answer: {error}") from None

    async def _exchange(self, client: Any, built: Any) -> bytes:
        response = await client.send(built, stream=True)
        try:
            content = bytearray()
            # as it came: what is short on the wire cannot unpack to something long
            async for part in response.aiter_raw():
                content += part
                if len(content) > MAX_ANSWER:
                    raise NoAnswer(f"an answer of more than {MAX_ANSWER} bytes")
        finally:
            await response.aclose()
        if (status := response.status_code) != 200:
            again = status >= 500 or status in ASK_AGAIN
            raise NoAnswer(f"status {status}: {bytes(content[:200])!r}", final=not again)
        return bytes(content)
