"""Samples of a rollout: of a small network, and always by one plan, as the operations that the first ones made."""

from __future__ import annotations

import torch
from torch import Tensor

from rlflow.flow.noise import Key, noise
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import Plan
from rlflow.rl.recorded import Recorded, small
from rlflow.types import Chain, Cond


class Sampler:
    """`policy.sample(cond, plan, key=key, row_ids=row_ids)`, the same bits."""

    def __init__(self, policy: FlowPolicy):
        self.policy = policy
        self.plan: Plan | None = None
        self._recorded = Recorded(self.fields, policy, list(policy.parameters()))
        self._small = small(policy, self._recorded.moving) and not policy.solver.needs_spread

    def renew(self) -> None:
        """Before an iteration, under the weights that sample."""
        self._recorded.renew()

    def __call__(self, cond: Cond, plan: Plan, key: Key, row_ids: Tensor) -> Chain:
        """One chain for each row of `cond`, without gradient."""
        policy, self.plan = self.policy, self.plan or plan
        if not self._small or plan.per_row or not _equal(plan, self.plan):
            return policy.sample(cond, plan, key=key, row_ids=row_ids)
        about = policy.event_shape, policy.dtype, policy.device
        x_0 = noise(key._replace(purpose=f"{key.purpose}/x_0"), row_ids, *about)
        keys = [key._replace(purpose=f"{key.purpose}/step", k=k) for k in range(plan.num_steps)]
        each = torch.stack([noise(k, row_ids, *about) for k in keys])
        return Chain(**self._recorded({name: cond[name] for name in cond.data}, x_0, each))

    def fields(self, cond: dict[str, Tensor], x_0: Tensor, step_noise: Tensor) -> dict[str, Tensor]:
        """Of a chain; recorded."""
        chain = self.policy.sample(Cond(cond), self.plan, x_0=x_0, step_noise=step_noise)
        return {name: value for name, value in vars(chain).items() if value is not None}


def _equal(a: Plan, b: Plan) -> bool:
    return all(torch.equal(*pair) for pair in ((a.t, b.t), (a.scored, b.scored), (a.noisy, b.noisy)))
