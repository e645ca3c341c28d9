"""What a policy gradient minimises: the objective's losses of (row, column) pairs, and the regularisers'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlflow.flow.policy import FlowPolicy
from rlflow.rl.batch import EVERY, Batch, Meter, Pairs, Rows
from rlflow.rl.learners.regularizers import Regularizers
from rlflow.rl.likelihoods.base import Likelihood, Score
from rlflow.rl.masked import weighted_sum
from rlflow.rl.objectives.base import Objective
from rlflow.types import Cond, Evidence


class Loss:
    """Weighted means whose denominators are global, so that pieces and ranks add up; logged term by term."""

    def __init__(self, likelihood: Likelihood, objective: Objective, regularizers: Regularizers):
        self.likelihood, self.objective, self.regularizers = likelihood, objective, regularizers

    def __call__(self, score: Score, evidence: Evidence, batch: Rows, pairs: Pairs, log: Meter) -> Tensor:
        """This rank's share of all terms, of scored pairs."""
        own = self.of_objective(score, evidence, batch, pairs, log)
        return own + self.regularizers.loss(score, evidence, batch, pairs, log)

    def of_objective(self, score: Score, evidence: Evidence, batch: Rows, pairs: Pairs, log: Meter) -> Tensor:
        """Mean of the objective's losses over its global denominator."""
        joint, out = self.likelihood.joint, self.objective.loss(score, evidence, batch.advantage_of(pairs))
        weight, total = batch.pair_weight(pairs, joint), log.denominator(joint)
        loss = weighted_sum(out.pairs, weight) / total
        log.add("policy/loss", loss)
        for name, value in out.logged.items():
            log.add(name, weighted_sum(value, weight) / total)
        return loss


class RowGradients:
    """(gradients by `parameters`, numbers for the log, log-ratios (M, R)) of whole rows (M,): tensors in and out."""

    def __init__(self, policy: FlowPolicy, loss: Loss, parameters: Sequence[Tensor]):
        self.policy, self.loss, self.parameters = policy, loss, list(parameters)

    def __call__(
        self, evidence: dict[str, Tensor], cond: dict[str, Tensor], weights: dict[str, Tensor], sums: Tensor
    ) -> tuple[Sequence[Tensor], dict[str, Tensor], Tensor]:
        """The same operations in every call where the objective is `fixed`, so it may be recorded."""
        rows, log = Rows(Evidence(**evidence), weights["alive"]), Meter()
        rows.row_weight, rows.advantage = weights["weight"], weights["advantage"]
        log.begin(sums, first=False)
        score = self.loss.likelihood.score(self.policy, Cond(cond), rows.evidence)
        loss = self.loss(score, rows.evidence, rows, EVERY, log)
        found = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        return found, log.values, apart(score, rows.evidence)


def row_tensors(batch: Batch, rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Evidence, condition and weights of rows (M,), as `RowGradients` takes them."""
    evidence = {n: v for n, v in vars(batch.evidence.index(rows)).items() if v is not None}
    whole, cond = {"alive": batch.row_alive, "weight": batch.row_weight, "advantage": batch.advantage}, batch.cond(rows)
    return evidence, {n: cond[n] for n in cond.data}, {n: v.index_select(0, rows) for n, v in whole.items()}


def apart(score: Score, evidence: Evidence) -> Tensor:
    """Log-ratios (M, R), 0 where they do not count."""
    return torch.where(evidence.valid, score.log_prob.detach() - evidence.old_log_prob, 0.0)


def reuses(policy: FlowPolicy, likelihood: Likelihood, sample_with: str) -> bool:
    """True where the first minibatch is scored with the unconditional velocities that its samples were made by."""
    return likelihood.scores_steps and sample_with == "live" and policy.field.constant_calls > 0
