"""What one iteration costs, in closed form: rows the network evaluates, a backward pass counting as two forwards.

rollout   N x calls of the K' steps (a noisy step is 1, a run of ODE steps what the solver needs; with
          shared noise the steps before the first noisy one run on N / G rows)
          and the S passes in which a CFM likelihood records its losses
reference N x R when a KL term is on
update    3 N x R per epoch (+ N x R for a joint ratio that does not fit in one micro-batch);
          of reward gradients 3 N for each step they go back through (adjoint.py: 3 N K under the reference too);
          off-policy, a step on a batch of n rows is n K for the target and 3 n K for the actor
each times the field's calls, 2 under guidance; a detached guidance branch has no backward pass
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlflow.assembly.parts import Parts
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import Solver
from rlflow.flow.steps import Plan
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.rl.learners.reward_gradient import RewardGradient, Through
from rlflow.rl.likelihoods.base import Likelihood
from rlflow.rl.off_policy.sac import SAC


@dataclass(frozen=True)
class Cost:
    """Forward-equivalents (rows) of one iteration on this process."""

    rollout: int
    reference: int
    update: int

    @property
    def total(self) -> int:
        """Everything."""
        return self.rollout + self.reference + self.update


def solver_calls(plan: Plan, solver: Solver, first: int = 0, last: int | None = None) -> int:
    """Network calls of the steps first..last-1 for one row; a run of ODE steps ends where noise is added."""
    noisy = plan.noisy if plan.noisy.ndim == 1 else torch.ones(plan.num_steps, dtype=torch.bool)
    total, run = 0, 0
    for step_is_noisy in noisy[first:last].tolist():
        if step_is_noisy:
            total, run = total + solver.num_calls(run) + 1, 0
        else:
            run += 1
    return total + solver.num_calls(run)


@dataclass(frozen=True)
class Sampling:
    """What decides the rows of a rollout: `rows` samples, of which `copies` in a run share a prompt."""

    policy: FlowPolicy
    likelihood: Likelihood | None
    rows: int
    copies: int
    shared_noise: bool

    def cost(self, plan: Plan) -> int:
        """Rows of an iteration whose chains follow `plan`."""
        policy = self.policy
        shared = self.shared_noise and self.copies > 1 and not plan.per_row
        split = plan.first_noisy() if shared else 0
        rollout = self.rows // self.copies * solver_calls(plan, policy.solver, 0, split)
        rollout += self.rows * solver_calls(plan, policy.solver, split)
        recorded = 0 if self.likelihood is None else self.rows * self.likelihood.record_rows(policy)
        return rollout * policy.field.calls + recorded


@dataclass(frozen=True)
class Ratios:
    """What decides the rows of PolicyGradient's update."""

    policy: FlowPolicy
    likelihood: Likelihood
    epochs: int
    micro_batch: int
    reference: bool
    anchor: bool
    reused: int = 0
    """Minibatches of an epoch where the first of all is scored with constants of its samples; 0: it is not."""

    def cost(self, rows: int, plan: Plan) -> tuple[int, int]:
        """(reference, update) of an iteration of `rows` samples whose chains follow `plan`."""
        policy, likelihood, field = self.policy, self.likelihood, self.policy.field
        columns = likelihood.num_columns(plan)
        scored_by = field if likelihood.scores_steps else field.unguided
        pairs = rows * columns
        twice = likelihood.joint and columns > self.micro_batch
        update = self.epochs * pairs * (scored_by.calls * (2 if twice else 1) + 2 * scored_by.graph_calls)
        if self.reused:
            update -= rows // self.reused * columns * field.constant_calls * (2 if twice else 1)
        reference = pairs * scored_by.calls if self.reference else 0
        if self.anchor:
            deployed = rows * solver_calls(policy.plan(), policy.solver)
            reference += deployed * field.calls
            update += self.epochs * deployed * (field.calls + 2 * field.graph_calls)
        return reference, update


@dataclass(frozen=True)
class Gradients:
    """What decides the rows of RewardGradient's update, if every sample counts."""

    policy: FlowPolicy
    through: Through
    kl: bool

    def cost(self, rows: int, plan: Plan) -> tuple[int, int]:
        """(reference, update) of an iteration of `rows` samples whose chains follow `plan`."""
        field = self.policy.field
        (reference, live), graph = self.through.passes(self.policy, plan), field.calls + 2 * field.graph_calls
        return rows * (reference * graph + self.kl * field.calls), rows * (live + self.kl) * graph


def iteration_cost(parts: Parts, iteration: int = 0) -> Cost:
    """The cost of `iteration`, unless a KL limit ends the update early or the critic warms up."""
    collector, algorithm, policy = parts.collector, parts.algorithm, parts.policy
    plan = collector.steps(iteration, policy.grid(policy.num_steps), collector.groups.row_ids())
    rows = collector.groups.num_rows * collector.horizon
    sampling = Sampling(policy, collector.likelihood, rows, collector.copies, collector.shared_noise)
    return Cost(sampling.cost(plan), *UPDATES[type(algorithm)](parts, rows, plan))


def _with_ratios(parts: Parts, rows: int, plan: Plan) -> tuple[int, int]:
    """(reference, update) of PolicyGradient."""
    a = parts.algorithm
    assert isinstance(a, PolicyGradient)
    reference, anchor = a.needs_reference, bool(a.anchor)
    reused = a.num_minibatches if a.reuses else 0
    return Ratios(parts.policy, a.likelihood, a.epochs, a.micro_batch, reference, anchor, reused).cost(rows, plan)


def _off_policy(parts: Parts, rows: int, plan: Plan) -> tuple[int, int]:
    """(reference, update) of SAC, whose next update stores `rows` decisions."""
    algorithm = parts.algorithm
    assert isinstance(algorithm, SAC)
    steps = range(algorithm.updates, algorithm.updates + algorithm.due(rows))
    actor = sum(step % algorithm.actor.every == 0 for step in steps)
    passes = algorithm.settings.batch_size * plan.num_steps * parts.policy.field.calls
    return 0, passes * (len(steps) + 3 * actor)


def _with_gradients(parts: Parts, rows: int, plan: Plan) -> tuple[int, int]:
    """(reference, update) of RewardGradient."""
    a = parts.algorithm
    assert isinstance(a, RewardGradient)
    return Gradients(parts.policy, a.through, bool(a.kl)).cost(rows, plan)


UPDATES: dict[type, Callable[[Parts, int, Plan], tuple[int, int]]] = {
    PolicyGradient: _with_ratios,
    SAC: _off_policy,
    RewardGradient: _with_gradients,
}
