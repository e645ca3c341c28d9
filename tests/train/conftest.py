"""A network of 20k weights that trains in milliseconds, and runs made of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlflow.envs.captions import scenes, words
from rlflow.models.dit import DiT
from rlflow.models.io import save_field
from rlflow.train.trainer import Trainer

TINY = (
    *("env.num_groups=2", "env.group_size=4", "env.rows_per_call=8", "eval.num=6", "train.tensorboard=false"),
    *("policy.precision=float32", "policy.num_steps=6", "reward.weights={brightness: 1}"),
    "eval.metrics={strict: brightness, base_distance: base_distance}",
)


def random_field(folder: Path, vocab: list[str]) -> str:
    """A checkpoint folder of random weights whose samples depend on the caption."""
    torch.manual_seed(0)
    field = DiT(vocab, size=16, patch=4, width=16, depth=1, heads=2)
    torch.nn.init.normal_(field.patch_out.weight, std=0.2)
    torch.nn.init.normal_(field.modulation.weight, std=0.2)
    return str(save_field(field, folder))


@pytest.fixture(scope="session")
def scenes_field(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A field that knows the words of the scenes."""
    return random_field(tmp_path_factory.mktemp("scenes"), scenes.VOCAB)


@pytest.fixture(scope="session")
def words_field(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A field that knows letters."""
    return random_field(tmp_path_factory.mktemp("words"), words.VOCAB)


@pytest.fixture
def tiny() -> list[str]:
    """Overrides that make any recipe's run small."""
    return list(TINY)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that matplotlib takes."""
    monkeypatch.setattr("rlflow.report.report.write_report", lambda run: Path(run))


@pytest.fixture
def trainer(scenes_field: str, no_report: None) -> Callable[..., Trainer]:
    """Make a Trainer of a tiny run: trainer(folder, *overrides, recipe=..., **keywords of Trainer)."""

    def make(run: Path, *overrides: str, recipe: str = "t2i_flow_grpo", **more: Any) -> Trainer:
        all_overrides = [*TINY, f"policy.field={scenes_field}", "train.minutes=", "train.iterations=2", *overrides]
        return Trainer(recipe, run, overrides=all_overrides, quiet=True, **more)

    return make
