"""The first log-ratio of the networks that ship, at the recipes' own precision: exactly 0 on a CPU.

`test_every_recipe_runs_two_iterations` asserts it of tiny networks; matrix products of another size may round otherwise.
"""

from pathlib import Path

import pytest

from rlflow.config import recipes
from rlflow.config.algorithms import AlgorithmConfig
from rlflow.report.metrics_file import read_metrics
from rlflow.train.trainer import Trainer

SHIPPED = [
    name
    for name in recipes.names()
    if name.startswith("t2i_") and isinstance(recipes.load(name).algorithm, AlgorithmConfig)
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_the_first_log_ratio_of_a_shipped_image_model_is_0(name: str, tmp_path: Path) -> None:
    """21 rows, a number that no pass divides; in the second iteration too, where the samples are the learner's own."""
    few = ["env.num_groups=3", "env.group_size=7", "algorithm.num_minibatches=2", "eval.num=2", "eval.every=1000"]
    few += ["train.tensorboard=false", "train.report=false", "train.minutes=", "train.iterations=2"]
    few += ["algorithm.critic_warmup=0"] if getattr(recipes.load(name).algorithm, "critic_warmup", 0) else []
    made = Trainer(name, tmp_path / "run", overrides=few, quiet=True)
    made.fit()
    rows = read_metrics(tmp_path / "run", "train")
    own = 2 if made.algorithm.sample_with == "live" else 1
    assert [row["policy/first_log_ratio_max"] for row in rows[:own]] == [0.0] * own
