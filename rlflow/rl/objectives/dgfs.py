"""Sub-trajectory balance relative to the reference chain (DGFS; Zhang et al. 2024): the tilted law, not the best.

    d_ij = F_i - F_j + sum_{k=i}^{j-1} log p(x_{k+1} | x_k) / p_ref(x_{k+1} | x_k),    F_R = scale A
    L = sum_{i<j} w_ij d_ij^2,    w_ij proportional to lam^(j-i)

of the R scored steps of a sample, F a path critic at the states before the end. All d_ij are 0 where the chain is the
reference chain tilted by exp(scale A) and F_i = log E_ref[exp(scale A) | x_i]; F_0 is log Z, of advantages: relative to
the group's mean for centred ones. The law of the samples is the tilted one where the kernel is memoryless (ancestral
eta=1, flow_sde a=1.4142); with others it is tilted for each x_0 apart.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlflow.flow.gaussian import Gaussian
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import Plan
from rlflow.parallel import dist
from rlflow.ranges import LearningRate, Positive, Share, Size
from rlflow.rl.advantages import moments
from rlflow.rl.batch import Batch, Pairs
from rlflow.rl.likelihoods.base import Likelihood, Score
from rlflow.rl.masked import weighted_sum
from rlflow.rl.objectives.base import Losses, Objective
from rlflow.rl.path_critic import PathCriticLearner
from rlflow.types import Evidence


def sub_trajectory_balance(residual: Tensor, lam: float) -> Tensor:
    """(M,) sum of w_ij d_ij^2 from what single steps leave, d_{k,k+1} (M, R); the weights w_ij sum to 1."""
    total = pad(residual, (1, 0)).cumsum(1)
    length = torch.arange(total.shape[1], device=total.device)
    span = length[None, :] - length[:, None]
    weight = torch.where(span > 0, lam ** (span - 1).clamp(min=0).to(total), 0.0)
    return ((total[:, None, :] - total[:, :, None]).square() * (weight / weight.sum())).sum((1, 2))


class DGFS(Objective):
    """`scale` is the strength of the tilt, `lam` weighs spans by lam^length: 0 single steps, 1 all alike."""

    needs_reference = True
    whole_rows = True
    has_critic = True
    critic: PathCriticLearner

    def __init__(
        self,
        likelihood: Likelihood,
        scale: Positive = 1.0,
        lam: Share = 0.9,
        critic_lr: LearningRate = 1e-3,
        critic_width: Size = 128,
    ):
        super().__init__(likelihood)
        if not likelihood.scores_steps or likelihood.joint or likelihood.reduce != "sum":
            raise ValueError(
                "dgfs balances log-densities of single steps in nats: set likelihood={name: chain, reduce: sum, "
                "joint: false} with it"
            )
        self.scale, self.lam, self.critic_lr, self.critic_width = scale, lam, critic_lr, critic_width

    def attach(self, policy: FlowPolicy) -> None:
        """Make the critic F."""
        self.critic = PathCriticLearner(policy, self.likelihood, self.critic_lr, self.critic_width)

    def check_steps(self, plan: Plan) -> None:
        """ValueError for columns with other steps between them, whose densities are not known."""
        later = plan.scored.long().cumsum(-1)
        if bool(((later > 0) & (later < later[..., -1:]) & ~plan.scored).any()):
            raise ValueError("dgfs balances spans of adjacent steps: use steps=all_but_last, or a window")

    def prepare(self, batch: Batch) -> None:
        """Advantages become those of single steps, F_{k+1} - F_k (N, R), the last one's end being the reward's."""
        self.target, flow = self.scale * batch.advantage, self.critic.values(batch)
        batch.advantage = _gains(flow, self.target)
        batch.metrics["policy/log_z"] = float(moments(flow[:, 0], batch.row_weight)[0])

    def loss(self, score: Score, evidence: Evidence, advantage: Tensor) -> Losses:
        """Of whole rows, the same in each of their columns. Logged: log p / p_ref of the chain, in nats."""
        gain = score.log_prob - _reference(evidence)
        loss = sub_trajectory_balance(gain - advantage, self.lam)
        return Losses(
            loss.unsqueeze(1).expand_as(gain), {"policy/log_ratio_ref": gain.detach().sum(1, True).expand_as(gain)}
        )

    def learn(self, batch: Batch, rows: Tensor) -> dict[str, Tensor]:
        """F's step down the same loss, of the densities that sampled."""
        evidence, target = batch.evidence_of(Pairs(rows, None)), self.target[rows]
        gain, weight = evidence.old_log_prob - _reference(evidence), batch.row_weight[rows]
        total = dist.all_sum(weight.sum()).clamp(min=1e-12)
        with torch.no_grad():  # the critic trains only itself
            cond = batch.cond(rows)

        def loss() -> Tensor:
            left = gain - _gains(self.critic.of(cond, evidence), target)
            return weighted_sum(sub_trajectory_balance(left, self.lam), weight) / total

        return {"critic/loss": self.critic.step(loss)}


def _gains(flow: Tensor, end: Tensor) -> Tensor:
    """(M, R) F_{k+1} - F_k from F_k (M, R) and F_R (M, 1)."""
    return torch.cat([flow[:, 1:], end], 1) - flow


def _reference(evidence: Evidence) -> Tensor:
    """(M, R) log-densities of the stored steps under the reference, in nats."""
    assert evidence.ref_mean is not None
    assert evidence.ref_std is not None
    reference = Gaussian(evidence.ref_mean, evidence.ref_std)
    return reference.log_prob(evidence.x_next, "sum", batch_dims=2, mask=evidence.counts)
