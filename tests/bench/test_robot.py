"""`rlflow bench robot` tells all it promises, counts what was run, and its peer scores everything tenfold."""

import itertools
import time

import pytest
import torch

from rlflow.bench.passes import listen
from rlflow.bench.peer import PlainLoop
from rlflow.bench.robot import ReinFlow, bench_paper, bench_robot
from rlflow.bench.size import Size
from rlflow.bench.stopwatch import Phases

TINY = Size(num_envs=4, num_chunks=3, chunk=2, width=8, depth=1, num_steps=2, num_minibatches=1, epochs=2)
ROWS = 4 * 3 * 2  # environments, chunks, denoising steps


@pytest.fixture
def peer():
    loop = PlainLoop(TINY, duplicates=10)
    yield loop
    loop.close()


def test_result_is_complete() -> None:
    result = bench_robot(False, 0.01, 1, ("hopper",), (1, 2), TINY, threads=1)
    first, last = result["envs"]
    assert (first["num_envs"], last["num_envs"]) == (1, 2)
    assert result["env_steps_per_s"] == last["ours"]["env_steps_per_s"] > 0
    assert result["s_per_iteration"] == result["iteration"]["s_per_iteration"] > 0
    assert 0 < result["network_share"] < 1.5  # by CPU time of a tiny network
    shares = result["iteration"]["phases"]
    assert set(shares) == {"simulate", "policy", "update", "other"}
    assert min(shares.values()) > 0
    assert sum(shares.values()) == pytest.approx(1)
    assert result["iteration"]["first_log_ratio_max"] < 1e-5
    assert set(result["latency_ms"]) == {"K=1", "K=2", "K=4"}
    assert all(set(row) == {"batch_1", "batch_64"} for row in result["latency_ms"].values())


def test_the_published_size_is_timed_beside_its_peer() -> None:
    result = bench_paper(TINY, threads=1)
    assert result["ratio"] == pytest.approx(result["plain_loop"]["s_per_iteration"] / result["ours"]["s_per_iteration"])
    for name in ("ours", "plain_loop"):
        assert sum(result[name]["seconds"].values()) == pytest.approx(result[name]["s_per_iteration"])


def test_a_phase_inside_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks once a reading."""
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    phases = Phases()
    with phases.phase("update"), phases.phase("policy"):
        time.perf_counter()
    with phases.phase("policy"):
        pass
    assert phases.seconds == {"update": 2, "policy": 1}
    assert phases.shares(4) == {"update": 0.5, "policy": 0.25, "other": 0.25}


def test_the_peer_scores_ten_times_what_ours_does(peer: PlainLoop) -> None:
    """Rows of the velocity network in one iteration: sampled once, scored once an epoch, and duplicated by the peer."""
    ours = ReinFlow(TINY, threads=1)
    ours.policy.multiple = 1  # nothing is filled up
    passes = listen(ours.policy.field, lambda: ours(0))
    assert sum(n for n, backward in passes if backward) == TINY.epochs * ROWS
    scored: list[int] = []
    hook = peer.field.register_forward_pre_hook(lambda _m, x: scored.append(len(x[0]) * torch.is_grad_enabled()))
    peer(0)
    hook.remove()
    assert sum(scored) == 10 * TINY.epochs * ROWS


def test_environment_steps_are_those_made(peer: PlainLoop) -> None:
    """All of them while no robot falls, fewer than the chunks hold once some do."""
    ours = ReinFlow(TINY, threads=1)
    full = TINY.num_envs * TINY.num_chunks * TINY.chunk
    for run in (ours, peer):
        run(0)
        assert run.env_steps == full
    for iteration in range(1, 40):
        ours.collector.collect(iteration)
        peer._step()
    before = ours.env_steps, peer.env_steps
    made = int(ours.collector.collect(99).num_steps.sum())
    assert 0 < made <= full
    assert before[0] == full  # collecting is not counted, an iteration is
    assert 39 * TINY.num_envs < before[1] - full <= 39 * TINY.num_envs * TINY.chunk
