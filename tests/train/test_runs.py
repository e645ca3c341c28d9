"""Runs and checkpoints opened again: the weights asked for, the same images, judged by what they were trained for."""

from collections.abc import Callable
from pathlib import Path

import pytest

import rlflow as rf
from rlflow.models.io import read_config, save_field
from rlflow.train.build import judged_by
from rlflow.train.runs import evaluator_of, judging_config
from rlflow.train.trainer import Trainer
from rlflow.train.worlds import WORLDS

WORDS = ("env.prompts=words", "eval.metrics={strict: brightness}", "eval.num=4")


# -- what judges it -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_an_embedded_checkpoint_is_judged_by_its_own_world(name: str) -> None:
    config = judging_config(name)
    assert read_config(name)["judged_by"] == WORLDS[name].judged_by, "what pre-training would write"
    assert (config.env.prompts, config.eval.metrics) == (WORLDS[name].prompts, WORLDS[name].metrics)
    evaluator = evaluator_of(name, num=3)
    evaluator.policy.field.unguided.tokenize(evaluator.columns["prompt"])


def test_the_model_of_a_run_is_judged_as_the_run(
    tmp_path: Path, trainer: Callable[..., Trainer], words_field: str
) -> None:
    """Also where it was copied to, once it carries `judged_by`."""
    run = tmp_path / "run"
    made = trainer(run, f"policy.field={words_field}", *WORDS)
    made.fit()
    expected = made.last_eval["eval/heldout/strict"]
    assert rf.evaluate(run / "model")["strict"] == pytest.approx(expected, rel=1e-5)
    save_field(made.policy.field.unguided, tmp_path / "live", judged_by=judged_by(made.config))
    evaluator = evaluator_of(tmp_path / "live")
    assert evaluator.columns == made.evaluator.columns
    assert (evaluator.num_steps, evaluator.judges.weights) == (6, {"strict": 1.0})
