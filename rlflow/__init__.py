"""rlflow: reinforcement-learning fine-tuning of flow policies, the same code for images and robots.

`import rlflow as rf` is instant: a name of the public interface loads its module, and torch, on first use.

    rf.Trainer(recipe, run).fit()       train; rf.Callback for code of your own at its turning points
    rf.load(name)                       a FlowPolicy of a run, a checkpoint or a diffusers pipeline
    rf.sample, rf.evaluate, rf.save     its images, its held-out metrics, its weights
    rf.Predictor, rf.export             a robot's policy for other programs, and as one file
    rf.compare_report                   several runs in one page
    rf.Reward, rf.RewardSet             rewards by functions
    rf.Prompts, rf.load_prompts         tables of prompts
    rf.write_demos                      demonstrations to clone
"""

from importlib import import_module
from typing import TYPE_CHECKING

from rlflow import moved

if TYPE_CHECKING:
    from rlflow.comparison.report import compare_report
    from rlflow.deploy.predict import Predictor, export
    from rlflow.deploy.runs import evaluate, load, save
    from rlflow.deploy.sampling import sample
    from rlflow.envs.demos.dataset import write_demos
    from rlflow.envs.prompts import Prompts, load_prompts
    from rlflow.flow.policy import FlowPolicy
    from rlflow.rewards.base import Reward, RewardSet
    from rlflow.train.callbacks import Callback
    from rlflow.train.trainer import Trainer

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "FlowPolicy",
    "Predictor",
    "Prompts",
    "Reward",
    "RewardSet",
    "Trainer",
    "compare_report",
    "evaluate",
    "export",
    "load",
    "load_prompts",
    "sample",
    "save",
    "write_demos",
]

_HOMES: dict[str, str] = {  # the imports above, for when the program runs
    "load": "rlflow.deploy.runs",
    "save": "rlflow.deploy.runs",
    "sample": "rlflow.deploy.sampling",
    "evaluate": "rlflow.deploy.runs",
    "Predictor": "rlflow.deploy.predict",
    "export": "rlflow.deploy.predict",
    "Trainer": "rlflow.train.trainer",
    "Callback": "rlflow.train.callbacks",
    "FlowPolicy": "rlflow.flow.policy",
    "Reward": "rlflow.rewards.base",
    "RewardSet": "rlflow.rewards.base",
    "Prompts": "rlflow.envs.prompts",
    "load_prompts": "rlflow.envs.prompts",
    "write_demos": "rlflow.envs.demos.dataset",
    "compare_report": "rlflow.comparison.report",
}

moved.install()

if not TYPE_CHECKING:  # to a type checker every unknown name would be Any

    def __getattr__(name: str) -> object:
        """Load a name of the public interface from its home, once."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it has {', '.join(_HOMES)}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Names for tab completion, the ones not loaded yet included."""
    return sorted({*globals(), *_HOMES})
