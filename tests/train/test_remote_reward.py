"""A run whose reward is served: the same as with the reward here, and it goes on when the server dies."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("uvicorn")

from rlflow.rewards.colour import brightness
from rlflow.rewards.remote.server import Service, listen
from rlflow.train.trainer import Trainer

REMOTE = (
    "reward.settings.far={name: remote, request_s: 5.0, total_s: 10.0, tries: 2, backoff_s: 0.01, rows: 3, url: %s}"
)


class Server:
    """A reward server of this process."""

    def __init__(self) -> None:
        self.server, listener = listen(Service("brightness", brightness), "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._run, args=(listener,), daemon=True)
        self.thread.start()

    def _run(self, listener: socket.socket) -> None:
        self.server.run(sockets=[listener])

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


def test_a_served_reward_trains_as_the_reward_here(
    tmp_path: Path, trainer: Callable[..., Trainer], server: Server
) -> None:
    """Up to the 8 bits of the pictures."""
    there = trainer(tmp_path / "there", "reward.weights={far: 1.0}", REMOTE % server.url)
    here = trainer(tmp_path / "here")
    for made in (there, here):
        made.fit()
    for far, near in zip(rows(tmp_path / "there"), rows(tmp_path / "here"), strict=True):
        assert far["reward/far/mean"] == pytest.approx(near["reward/brightness/mean"], abs=2e-3)
        assert far["reward/far/masked_frac"] == 0
    assert "url" in (tmp_path / "there/config.yaml").read_text()


def test_a_run_goes_on_when_its_server_dies(tmp_path: Path, trainer: Callable[..., Trainer], server: Server) -> None:
    """Nothing is learnt from masked rows, nothing hangs, and the log says why."""
    weights: list[torch.Tensor] = []

    def callback(made: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        weights.append(torch.cat([p.detach().flatten() for p in made.policy.parameters()]).clone())
        if iteration == 1:
            server.stop()

    overrides = ("reward.weights={far: 1.0}", REMOTE % server.url, "train.iterations=3")
    trainer(tmp_path / "run", *overrides, callbacks=[callback]).fit()
    masked = [row["reward/far/masked_frac"] for row in rows(tmp_path / "run")]
    assert masked == [0.0, 1.0, 1.0]
    assert rows(tmp_path / "run")[1]["reward/far/errors"] >= 1
    assert torch.equal(weights[0], weights[2]), "no reward, no step"
    assert weights[0].isfinite().all()
