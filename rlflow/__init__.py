"""rlflow: reinforcement-learning fine-tuning of flow policies, the same code for images and robots.

`import rlflow as rf` is instant: a name of the public interface loads its module, and torch, on first use.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES: dict[str, str] = {
    "load": "rlflow.deploy.runs",
    "save": "rlflow.deploy.runs",
    "sample": "rlflow.deploy.runs",
    "evaluate": "rlflow.deploy.runs",
    "Trainer": "rlflow.train.trainer",
    "FlowPolicy": "rlflow.flow.policy",
    "Reward": "rlflow.rewards.base",
    "RewardSet": "rlflow.rewards.base",
    "Prompts": "rlflow.envs.prompts",
    "load_prompts": "rlflow.envs.prompts",
}


def __getattr__(name: str) -> Any:
    """Load a name of the public interface from its home, once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it has {', '.join(_HOMES)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names for tab completion, the ones not loaded yet included."""
    return sorted({*globals(), *_HOMES})
