"""The policy of a run that acted on a frozen one (`env.frozen`), deployed: both together make the robot's action."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlflow.envs.frozen import BasePolicy, Steering
from rlflow.flow.noise import Key, noise
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.select import Select
from rlflow.flow.steps import Plan


class Steered(Select):
    """`act` gives what the environment takes; a call by itself what the learner does, as evaluations hand it over."""

    def __init__(self, select: Select, steering: Steering):
        self.select, self.steering, self.num = select, steering, select.num

    @property
    def about(self) -> str:
        """That there are two."""
        return "acts on a frozen policy"

    def __call__(self, *args: Any, **settings: Any) -> Tensor:
        """Of the choice among samples inside."""
        return self.select(*args, **settings)

    def act(self, policy: FlowPolicy, obs: Any, plan: Plan, key: Key, row_ids: Tensor) -> Tensor:
        """Start noises that the frozen policy draws by itself follow from (key, row_ids), too."""
        start = key._replace(purpose=f"{key.purpose}/frozen")
        x_0 = noise(start, row_ids, self.steering.flow.noise_shape) if self.steering.draws else None
        seen = self.steering.see(obs, x_0)
        return self.steering.act(obs, seen, self.select.act(policy, seen, plan, key, row_ids), x_0)


def maker(policy: FlowPolicy) -> FlowPolicy:
    """Whose samples leave: the policy's own, or those of the frozen one that it acts on, if that is known here."""
    flow = policy.select.steering.flow if isinstance(policy.select, Steered) else None
    return flow.policy if isinstance(flow, BasePolicy) else policy
