"""scripts/bench_envs.py runs and says what it promises; nothing is asserted of its times."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_envs.py"
TINY = ["--envs", "2", "--seconds", "0.01", "--repeats", "1", "--chunk", "2"]


def printed(monkeypatch, capsys, *words: str) -> dict:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    return row


@pytest.mark.parametrize("task", ["hopper", "halfcheetah"])
def test_a_tiny_bench_prints_json(task, monkeypatch, capsys):
    row = printed(monkeypatch, capsys, "--task", task, "--threads", "1")
    assert (row["num_envs"], row["chunk"]) == (2, 2)
    for contender in ("ours", "gymnasium_sync", "gymnasium_async", "physics"):
        assert row[contender]["env_steps_per_s"] > 0
    for other in ("gymnasium_sync", "gymnasium_async", "physics"):
        ratio = row["ours"]["env_steps_per_s"] / row[other]["env_steps_per_s"]
        assert row["ratio"][other] == pytest.approx(ratio, rel=0.05)  # one repeat; rates are rounded


@pytest.mark.slow
def test_warp_plays_too(monkeypatch, capsys):
    pytest.importorskip("mujoco_warp")
    row = printed(monkeypatch, capsys, "--backend", "warp")
    assert not row["overflow"]
    assert min(row[contender]["env_steps_per_s"] for contender in ("ours", "with_policy", "physics")) > 0
