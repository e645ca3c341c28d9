"""`rlflow bench peers` and `sizes` tell what they promise, and name a peer that is not installed; no times are asserted."""

import itertools
import json
import runpy
import sys
import time
from pathlib import Path

import pytest

from rlflow.bench import peers, sizes
from rlflow.cli import main
from rlflow.commands.bench import PEERS

SCRIPT = Path(__file__).parents[2] / "scripts" / "draw_speed.py"


def test_the_command_knows_every_row():
    assert tuple(peers.ROWS) == PEERS


def test_turns_alternate_and_a_ratio_is_the_median_inside_a_turn(monkeypatch):
    clock = itertools.chain([0, 1, 0, 1], [0, 2, 0, 4], [0, 4, 0, 4], [0, 1, 0, 9])  # a turn each, the first warms up
    monkeypatch.setattr(time, "process_time", lambda: float(next(clock)))
    order = []
    found = peers.in_turns({n: lambda n=n: float(order.append(n) is None) for n in ("a", "b")}, 3)
    assert order == ["a", "b"] * 4
    (line,) = peers.lines("row", "what", "1/s", found)
    assert (line.ours, line.theirs) == (0.5, 0.25)
    assert line.ratio == 2.0


def test_a_peer_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "envpool", None)
    monkeypatch.setattr(peers, "lines", lambda *a: [])
    monkeypatch.setattr("rlflow.bench.envs.TASKS", dict.fromkeys(("hopper", "halfcheetah", "ant"), TASK))
    main(["bench", "peers", "--rows", "environments", "--repeats", "1"])
    out = capsys.readouterr().out
    assert "EnvPool  steps/s  not installed: pip install 'rlflow-torch[bench]'" in out
    assert "load of" in out


TASK = pytest.importorskip("rlflow.envs.simulators.mujoco").INVERTED_PENDULUM


@pytest.mark.parametrize("kind", ["environments", "denoising_steps", "replay", "reports_columns", "prompts_columns"])
def test_a_point_of_each_size(kind):
    found = sizes.point(kind, 1600 if kind == "replay" else 8)
    assert found["size"] in (8, 1600)
    assert found["rate"] > 0
    assert found["mib"] >= 0


@pytest.mark.parametrize("row", ["reports", "prompts"])
def test_columns_and_dicts_hold_the_same(row):
    counted = [sizes.KINDS[f"{row}_{kind}"](2000)() for kind in ("columns", "dicts")]
    assert counted == [2000.0, 2000.0]


def test_the_picture_is_drawn_from_the_json(tmp_path, monkeypatch):
    points = [{"size": n, "rate": 1.0 + n, "cpu_s": 1.0, "mib": 2.0} for n in (1, 10)]
    found = {"images": {"about": "images", "unit": "1/s", "points": points}, "setting": {}}
    (tmp_path / "sizes.json").write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "sizes.json"), str(tmp_path / "x.png")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_without_a_checkout_the_guided_loop_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("rlflow.bench.iterations.SCRIPT", tmp_path / "gone.py")
    (line,) = peers.flow_grpo(1)
    assert line.note == "needs a checkout"


def test_the_guided_row_tells_how_many_times_as_fast(monkeypatch):
    told = {"ours_cpu_s": 2.0, "peer_cpu_s": 3.0, "bare_cpu_s": 1.0, "peer_bare_cpu_s": 2.5}
    told |= {"speed_ratio": 1.5, "bare_ratio": 0.5, "peer_bare_ratio": 1.25}
    monkeypatch.setattr("rlflow.bench.images.bench_flow_grpo", lambda **_: told)
    found = peers.flow_grpo(4)
    assert [(line.peer, line.ours, line.theirs, line.ratio) for line in found] == [
        ("single-file loop", 0.5, 1 / 3, 1.5),
        ("its passes run bare", 0.5, 1.0, 0.5),
        ("the loop's passes run bare", 0.5, 0.4, 1.25),
    ]
