"""The network rows per image that docs/pretrained.md states for each recipe are those of its plan."""

import re
from pathlib import Path

import pytest

from rlflow.assembly.parts import make_parts
from rlflow.config import recipes
from rlflow.config.algorithms import AlgorithmConfig
from rlflow.cost.estimate import Planner
from rlflow.cost.formula import iteration_cost
from rlflow.doctor.doctor import NO_LIMIT

PAGE = (Path(__file__).parents[2] / "docs" / "pretrained.md").read_text()
STATED = {name: int(rows) for name, rows in re.findall(r"^\| `(\w+)` \| (\d+) \|", PAGE, re.M)}


FAST = ("sd35_draft", "flux_mixgrpo_flash")
"""Counted in the fast tests too: a reward's gradient, and a chain."""


@pytest.fixture
def small(tiny_of, tmp_path):
    """small(recipe): overrides that let it run on a tiny checkpoint of its family."""
    (tmp_path / "prompts.txt").write_text("".join(f"{i} cats\n" for i in range(12)))
    return lambda name: [
        f"policy.field.checkpoint={tiny_of(name)}",
        "policy.field.resolution=32",
        *([] if name.startswith(("sd15", "sdxl")) else ["policy.field.max_sequence_length=16"]),
        f"policy.max_kappa={NO_LIMIT}",
        f"env.prompts={tmp_path / 'prompts.txt'}",
        "env.num_groups=1",
        "reward.weights={brightness: 1, redness: 1}",
        "reward.settings={}",
        "eval.metrics={}",
        *(["algorithm.num_minibatches=1"] if isinstance(recipes.load(name).algorithm, AlgorithmConfig) else []),
    ]


@pytest.mark.parametrize("name", STATED)
def test_rows_per_image_are_the_plans(name, small):
    """Its mean over the iterations, windows having moved."""
    config = recipes.load(name, small(name))
    mean = Planner(config).shape(config).cost.total / config.env.group_size
    assert round(mean) == STATED[name], mean


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in STATED])
def test_the_first_iteration_is_counted_where_the_network_is_called(name, small):
    """A pair of rows of a tiny checkpoint costs what the formula says."""
    parts = make_parts(recipes.load(name, [*small(name), "env.group_size=2"]))
    cost = iteration_cost(parts).total
    before = parts.policy.network_cost
    parts.algorithm.update(parts.collector.collect(0))
    assert parts.policy.network_cost - before == cost


def test_every_recipe_of_a_checkpoint_states_its_cost():
    fields = {name: recipes.read(name).get("policy", {}).get("field") for name in recipes.names()}
    assert sorted(STATED) == sorted(
        n for n, field in fields.items() if isinstance(field, dict) and field.get("name") == "pretrained"
    )
