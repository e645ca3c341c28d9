"""The step plan of a config: its draws are those of the run's seed unless it states one of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlflow import registry

if TYPE_CHECKING:
    from rlflow.config.schema import Config
    from rlflow.flow.steps import Steps


def make_steps(config: Config, trust_code: bool = False) -> Steps:
    """Seeds of a table would else share every window; ValueError as of every component."""
    name, given = registry.split_spec("steps", config.steps)
    with registry.located("steps"):
        draws = "seed" in registry.settings(registry.find("steps", name, trust_code))
    spec = {"seed": config.train.seed} | given if draws else given
    steps: Steps = registry.build("steps", "steps", {"name": name} | spec, trust_code=trust_code)
    return steps
