"""scripts/bench_envs.py runs and says what it promises; nothing is asserted of its times."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_envs.py"


@pytest.mark.parametrize("task", ["hopper", "halfcheetah"])
def test_a_tiny_bench_prints_json(task, monkeypatch, capsys):
    tiny = ["--task", task, "--envs", "2", "--seconds", "0.01", "--repeats", "1", "--chunk", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *tiny])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["num_envs"], row["chunk"]) == (2, 2)
    for contender in ("ours", "gymnasium_sync", "physics"):
        assert min(row[contender].values()) > 0
