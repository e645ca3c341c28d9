"""Each seed of a table has its own step draws, unless the recipe states one for all."""

import pytest
import torch

from rlflow.config import recipes
from rlflow.config.steps import make_steps

GRID, ROWS = torch.linspace(0, 1, 9, dtype=torch.float64), torch.arange(6)
PLANS = ["random_window", "one_random", "fraction", "{name: window, strategy: random, every: 1}"]


def draws(*overrides: str) -> torch.Tensor:
    steps = make_steps(recipes.load("t2i_flow_grpo_fast", overrides))
    return torch.stack([steps(i, GRID, ROWS).scored.expand(6, -1) for i in range(12)])


@pytest.mark.parametrize("plan", PLANS)
def test_draws_are_of_the_seed_of_the_run(plan: str) -> None:
    first, again, other = (draws(f"steps={plan}", f"train.seed={seed}") for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first, draws(f"steps={plan}", "steps.seed=0", "train.seed=1")), "a stated seed is kept"
