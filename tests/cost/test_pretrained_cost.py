"""The network rows per image that docs/pretrained.md states for each recipe are those of its plan."""

import re
from pathlib import Path

import pytest

from rlflow.config import recipes
from rlflow.config.processes import share
from rlflow.config.schema import AlgorithmConfig
from rlflow.cost.formula import iteration_cost
from rlflow.cost.plan import Shape
from rlflow.cost.skeleton import skeleton
from rlflow.doctor.doctor import NO_LIMIT
from rlflow.train.build import make_parts

PAGE = (Path(__file__).parents[2] / "docs" / "pretrained.md").read_text()
STATED = {name: int(rows) for name, rows in re.findall(r"^\| `(\w+)` \| (\d+) \|", PAGE, re.M)}


@pytest.mark.parametrize("name", STATED)
def test_rows_per_image(name, tiny_of, tmp_path):
    """Stated is the plan's mean over its iterations, windows having moved; iteration 0 is counted by the policy where
    the network is called, on a pair of rows of a tiny checkpoint."""
    (tmp_path / "prompts.txt").write_text("".join(f"{i} cats\n" for i in range(12)))
    overrides = [
        f"policy.field.checkpoint={tiny_of(name)}",
        "policy.field.resolution=32",
        "policy.field.max_sequence_length=16",
        f"policy.max_kappa={NO_LIMIT}",
        f"env.prompts={tmp_path / 'prompts.txt'}",
        "env.num_groups=1",
        "reward.weights={brightness: 1, redness: 1}",
        "reward.settings={}",
        "eval.metrics={}",
    ]
    is_planned = isinstance(recipes.load(name).algorithm, AlgorithmConfig)
    overrides += ["algorithm.num_minibatches=1"] if is_planned else []
    parts = make_parts(recipes.load(name, [*overrides, "env.group_size=2"]))
    cost = iteration_cost(parts).total
    before = parts.policy.network_cost
    parts.algorithm.update(parts.collector.collect(0))
    assert parts.policy.network_cost - before == cost
    if not is_planned:  # every iteration is like the first
        assert round(cost / 2) == STATED[name]
        return
    config = recipes.load(name, overrides)
    mean = Shape.of(config, skeleton(config), share(config, world=1), 1).cost.total / config.env.group_size
    assert round(mean) == STATED[name], mean


def test_every_recipe_of_a_checkpoint_states_its_cost():
    fields = {name: recipes.read(name).get("policy", {}).get("field") for name in recipes.names()}
    assert sorted(STATED) == sorted(
        n for n, field in fields.items() if isinstance(field, dict) and "checkpoint" in field
    )
