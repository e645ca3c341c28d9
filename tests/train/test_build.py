"""From a config to parts: prompts that training and evaluation share out, and what does not fit said at once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rlflow.config import recipes
from rlflow.envs.prompts import Prompts, load_prompts
from rlflow.rl.off_policy.sac import SAC
from rlflow.train.build import make_parts
from rlflow.train.trainer import Trainer


def test_held_out_prompts_of_a_file_are_never_trained_on(tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    """A file of its own for evaluation leaves the training file whole."""
    mine, other = tmp_path / "mine.txt", tmp_path / "other.txt"
    captions = dict.fromkeys(load_prompts("scenes:pair").take(range(40))["prompt"])
    mine.write_text("\n".join(captions))
    other.write_text(next(iter(captions)))

    def texts(prompts: Prompts) -> set[str]:
        return {row["prompt"] for row in prompts.rows}

    made = trainer(tmp_path / "a", f"env.prompts={mine}")
    trained, held_out = texts(made.collector.env.prompts), texts(made.evaluator.prompts)
    assert trained | held_out == set(captions)
    assert trained.isdisjoint(held_out)
    made = trainer(tmp_path / "b", f"env.prompts={mine}", f"eval.prompts={other}")
    assert texts(made.collector.env.prompts) == set(captions)
    assert texts(made.evaluator.prompts) == {next(iter(captions))}


@pytest.mark.parametrize(("key", "of"), [("env.prompts", "env"), ("eval.prompts", "eval")])
def test_a_prompt_the_model_cannot_read_is_said_before_the_first_iteration(
    tmp_path: Path, trainer: Callable[..., Trainer], key: str, of: str
) -> None:
    path = tmp_path / "p.txt"
    path.write_text("one red circle\n\none pink circle\n")
    with pytest.raises(ValueError, match=rf"^{of}\.prompts: .*p\.txt:3: 'one pink circle': unknown word 'pink'"):
        trainer(tmp_path / "run", f"{key}={path}")


def test_a_toy_field_takes_no_prompts(tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(
        ValueError, match=r"^policy\.field: a network from scratch makes no images: .*shapes.* or a simulator$"
    ):
        trainer(tmp_path / "run", "policy.field=mlp")


@pytest.mark.parametrize("control", [True, False])
def test_a_control_of_sac_is_told_to_be_one(control: bool) -> None:
    algorithm = make_parts(recipes.load("robot_reach_sac", [f"train.permute_rewards={control}"])).algorithm
    assert isinstance(algorithm, SAC)
    assert algorithm.permute is control
