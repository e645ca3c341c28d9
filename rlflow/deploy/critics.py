"""The critic of a finished or running run with critics as the scorer of a choice among actions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rlflow.assembly.learner import twin_settings
from rlflow.config.algorithms import OffPolicyConfig
from rlflow.deploy.runs import is_run, read_run_config, restored
from rlflow.registry import SettingError
from rlflow.rl.off_policy.twin import Twin
from rlflow.train.checkpoint import Checkpoints
from rlflow.types import Tree


class SavedCritic:
    """Q(observation, action) as a run of algorithm=sac learnt it, with the features of that run's own policy."""

    def __init__(self, run: str, event_shape: tuple[int, ...], checkpoint: str = "last", trust_code: bool = False):
        if not is_run(run):
            raise SettingError("run", f"{run} is no run folder: name one of a recipe of algorithm=sac")
        config = read_run_config(run, trust_code)
        if not isinstance(config.algorithm, OffPolicyConfig):
            raise SettingError("run", f"{run} has no critic of actions: name a run of algorithm=sac")
        if config.env.frozen is not None:
            raise SettingError("run", f"{run} has a critic of what is done to its env.frozen: name a run without")
        self.policy = restored(config, run, checkpoint, "live", trust_code).requires_grad_(False)
        shape = self.policy.event_shape
        if shape != event_shape:
            raise SettingError("run", f"{run} has a critic of actions {shape}, the policy makes {event_shape}")
        width = self.policy.field.num_features + torch.Size(shape).numel()
        self.twin = Twin(width, twin_settings(config.algorithm), self.policy.device, self.policy.dtype)
        self.twin.net.load_state_dict(Checkpoints(Path(run)).load(checkpoint)[1]["algorithm"]["twin"]["net"])

    @torch.no_grad()
    def __call__(self, actions: Tensor, obs: Tree) -> Tensor:
        """(N, n) values of actions (N, n, H, *A) at raw observations (N, ...)."""
        num, each = actions.shape[:2]
        cond = self.policy.encode(obs).repeat(each)
        return self.twin.value(cond, actions.flatten(0, 1)).view(num, each)
