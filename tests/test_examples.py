"""The worked examples of docs/examples run as they stand, on smaller settings, from a folder that is not theirs."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs/examples"
TINY = (
    "train.minutes=",
    "train.iterations=1",
    "train.threads=1",
    "train.tensorboard=false",
    "train.report=false",
    "env.group_size=2",
)
SMALL = {
    "own_pipeline.py": ("folder", "run", *TINY, "eval.num=2", "eval.num_steps=2"),
    "own_robot.py": (".", "20", *TINY[:-1], "env.num_groups=2", "eval.num=2"),
    "own_method.py": ("run", *TINY, "env.num_groups=2", "eval.num=2"),
}


def test_every_example_is_short_and_run_here():
    scripts = {path.name: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == set(SMALL)
    for name, text in scripts.items():
        assert text.count("\n") < 60, name
        assert f".. literalinclude:: {name}" in (EXAMPLES / "index.rst").read_text()


@pytest.mark.parametrize("name", SMALL)
def test_the_example_trains(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *SMALL[name]])
    monkeypatch.syspath_prepend(EXAMPLES)  # as `python docs/examples/NAME` does
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    sys.modules.pop(Path(name).stem, None)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["eval", "train", "eval"]
