"""Modules that moved into rooms of their own: their former names still import, as the same modules, and say so."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "rlflow.flow.density": "rlflow.doctor.density",
    "rlflow.predict": "rlflow.deploy.predict",
    "rlflow.models.pretrained.lerobot": "rlflow.models.lerobot.field",
    "rlflow.models.tiny": "rlflow.models.pretrained.tiny",
    "rlflow.train.cloning": "rlflow.pretrain.cloning",
    "rlflow.train.episodes": "rlflow.evaluation.episodes",
    "rlflow.train.evaluate": "rlflow.evaluation.images",
    "rlflow.train.video": "rlflow.report.video",
    "rlflow.report.comparison": "rlflow.comparison.report",
    "rlflow.envs.gym": "rlflow.envs.simulators.gym",
    "rlflow.envs.mujoco": "rlflow.envs.simulators.mujoco",
    "rlflow.envs.ogbench": "rlflow.envs.simulators.ogbench",
    "rlflow.envs.scenes": "rlflow.envs.captions.scenes",
}
"""Of those that the documentation named."""


class Moved(MetaPathFinder, Loader):
    """Finds a former name, and gives the module of today."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None for every other name."""
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module of today; DeprecationWarning."""
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} is now {new}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is run again; what the import wrote over is put back."""
        module.__spec__ = self.spec


def install() -> None:
    """Once."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.append(Moved())
