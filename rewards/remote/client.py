"""A reward that is computed elsewhere: the client of `rlflow serve-reward` (server.py).

A batch is cut into requests of `rows` rows, asked at the same time. Rows whose request has no good answer are masked
and counted; the others keep theirs, in order. A reward that compares the rows of a group gets the batch whole.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlflow.registry import SettingError
from rlflow.rewards.base import Elsewhere
from rlflow.rewards.calls import check_seconds
from rlflow.rewards.component import reads
from rlflow.rewards.remote.ask import Asker, NoAnswer, Patience, Request, check_url, read_token
from rlflow.rewards.remote.breaker import Breaker
from rlflow.rewards.remote.wire import TYPE, Batch, pack, read_answer
from rlflow.rewards.scores import SomeRows

PROTOCOL = 1


class Remote(Elsewhere):
    """Scores of a reward server (rlflow serve-reward), which may be dead, slow or wrong: then rows are masked."""

    def __init__(
        self,
        url: str,
        rows: int = 32,
        request_s: float = 20.0,
        total_s: float = 50.0,
        tries: int = 3,
        parallel: int = 4,
        backoff_s: float = 0.5,
        failures: int = 6,
        rest_s: float = 30.0,
        wait_s: float = 30.0,
        token_env: str = "RLFLOW_REWARD_TOKEN",
    ):
        if rows < 1:
            raise SettingError("rows", f"must be 1 or more, got {rows}")
        check_seconds("wait_s", wait_s, allows_none=True)
        url = check_url(url)
        token, patience = read_token(token_env, url), Patience(request_s, total_s, tries, backoff_s, parallel)
        breaker = Breaker(failures, rest_s)
        columns = _columns(Asker(url, token, patience, Breaker()), wait_s)
        self.__signature__ = reads(columns)
        self.rows = None if "group" in columns else rows
        self.asker = Asker(f"{url}/score", token, patience, breaker)

    def __call__(self, **columns: Any) -> Tensor:
        """(N,) scores; SomeRows where some have none."""
        number = len(next(iter(columns.values())))
        step = self.rows or number
        batches = [_part(columns, start, min(start + step, number)) for start in range(0, number, step)]
        answers = self.asker.ask([Request(pack(b), TYPE, partial(read_answer, b)) for b in batches])
        scores = torch.full((number,), torch.nan)
        for i, said in enumerate(answers):
            if not isinstance(said, NoAnswer):
                values = [torch.nan if score is None else score for score in said]
                scores[i * step : i * step + batches[i].rows] = torch.tensor(values)
        if failures := [said for said in answers if isinstance(said, NoAnswer)]:
            raise SomeRows(scores, f"{len(failures)} of {len(answers)} requests have no answer: {failures[0]}")
        return scores


def _part(columns: Mapping[str, Any], start: int, stop: int) -> Batch:
    return Batch(uuid.uuid4().hex, stop - start, {name: value[start:stop] for name, value in columns.items()})


def _columns(asker: Asker, wait_s: float) -> list[str]:
    """What the server's reward reads; ValueError if none answers within `wait_s`."""
    said = _health(asker, wait_s)
    columns = said.get("columns") if isinstance(said, dict) and said.get("protocol") == PROTOCOL else None
    if not isinstance(columns, list) or not columns or not all(str(name).isidentifier() for name in columns):
        raise ValueError(f"what answers at {asker.url} is no reward server of this version")
    return columns


def _health(asker: Asker, wait_s: float) -> Any:
    end = time.monotonic() + wait_s
    while True:
        try:
            return asker.get("/health", max(1.0, min(wait_s, 10.0)))
        except NoAnswer as error:
            if error.final or time.monotonic() > end:
                raise ValueError(
                    f"no reward server at {asker.url} ({error}): start `rlflow serve-reward NAME --port P`"
                ) from None
            time.sleep(0.2)
