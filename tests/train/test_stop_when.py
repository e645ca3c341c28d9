"""train.stop_when: a rule ends a run as its budget would, says why, and a resumed run comes to the same end."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlflow.cli import main
from rlflow.report.metrics_file import read_metrics
from rlflow.report.record import RunRecord
from rlflow.report.report import _state
from rlflow.train.checkpoint import Checkpoints
from rlflow.train.sweep import Job, state
from rlflow.train.trainer import Trainer

Make = Callable[..., Trainer]
AT_2 = "train.stop_when={metric: cost/samples_total, above: 15}"  # 8 an iteration


def test_a_rule_ends_a_run_in_order(tmp_path: Path, trainer: Make) -> None:
    """The last evaluation, the checkpoint and the model are made, and the reason stands wherever one looks."""
    made = trainer(tmp_path / "run", "train.iterations=5", AT_2)
    made.fit()
    assert (made.iteration, made.interrupted) == (2, False)
    assert made.stops.reason == "cost/samples_total above 15: 16 after iteration 2"
    assert [row["iteration"] for row in read_metrics(tmp_path / "run") if row["kind"] == "eval"] == [0, 2]
    assert (tmp_path / "run/model/config.json").is_file()
    assert json.loads((tmp_path / "run/run.json").read_text())["stopped"] == made.stops.reason
    assert "2 iterations, " in _state(RunRecord.read(tmp_path / "run"))
    assert f"then stopped: {made.stops.reason}" in _state(RunRecord.read(tmp_path / "run"))
    job = Job("a", "t2i_flow_grpo", (), 0, made.config)
    Path(tmp_path / "a").mkdir()
    (tmp_path / "run").rename(tmp_path / "a/seed-0")
    assert state(job, tmp_path) == "finished"


def test_a_stopped_run_that_is_resumed_ends_again_until_the_rule_is_gone(tmp_path: Path, trainer: Make) -> None:
    run = tmp_path / "run"
    trainer(run, "train.iterations=3", AT_2).fit()
    again = trainer(run, "train.iterations=3", AT_2, resume="last")
    again.fit()
    assert again.iteration == 2
    free = trainer(run, "train.iterations=3", resume="last")
    free.fit()
    assert (free.iteration, free.stops.reason) == (3, "")
    assert "stopped" not in json.loads((run / "run.json").read_text())


def test_a_resumed_run_stops_where_it_would_have(tmp_path: Path, trainer: Make) -> None:
    """Which needs the best value from before: the judge never reaches it again."""
    rule = "train.stop_when={metric: eval/heldout/brightness, falls: 0.5}"

    def run(name: str, values: Iterator[float], **more: Any) -> Trainer:
        made = trainer(tmp_path / name, "train.iterations=6", "eval.every=1", rule, **more)
        made.evaluator = Scripted(made.evaluator, values)
        made.fit()
        return made

    whole, parts = (iter([0.9, 0.8, 0.6, 0.3, 0.2]) for _ in range(2))
    run("parts", parts, callbacks=[lambda made, iteration, metrics: made.stop() if iteration == 2 else None])
    made = [run("whole", whole), run("parts", parts, resume="last")]
    stopped = [(each.iteration, each.stops.reason) for each in made]
    assert stopped[0] == stopped[1]
    assert stopped[0][0] == 3
    a, b = (Checkpoints(tmp_path / name).load("last")[1] for name in ("whole", "parts"))
    assert all(torch.equal(v, b["policy"][n]) for n, v in a["policy"].items())


class Scripted:
    """An evaluator whose brightness is what the script says."""

    def __init__(self, inner: Any, values: Iterator[float]):
        self.inner, self.values = inner, values
        self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict

    def __call__(self, weights: str = "live") -> Any:
        result = self.inner(weights)
        result.scores["brightness"] = torch.full((len(result),), next(self.values))
        return result


def test_the_command_says_why_it_ended(
    tmp_path: Path, tiny: list[str], scenes_field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*tiny, f"policy.field={scenes_field}", "train.minutes=", "train.iterations=4", AT_2]
    main(["train", "t2i_flow_grpo", *overrides, "--run", str(tmp_path / "run"), "--quiet"])
    assert "stopped: cost/samples_total above 15: 16 after iteration 2: 2 iterations, " in capsys.readouterr().out
