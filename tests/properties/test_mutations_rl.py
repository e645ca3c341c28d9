"""Mistakes of released code, put into the learner one at a time: each must be seen by the check that names it.

A mutant trains happily; only a number tells. `MUTANTS` pairs the mistake with that number, and every check is also run
on the code as it is. Mistakes in the flow core are in test_mutations_flow.py.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlflow.envs.prompt import PromptEnv
from rlflow.envs.prompts import Prompts
from rlflow.envs.simulators.toy import ToyImage
from rlflow.flow.gaussian import Gaussian
from rlflow.flow.kernels import FlowSDE, Kernel, LearnedNoise
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import AllButLast
from rlflow.flow.weights import WeightSets
from rlflow.models.mlp import MLPField
from rlflow.rewards.base import Reward, RewardSet
from rlflow.rl import advantages, batch
from rlflow.rl.advantages import GAE, GroupAdvantage
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.rl.learners import policy_gradient
from rlflow.rl.learners.loss import Loss
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.rl.learners.regularizers import KL
from rlflow.rl.likelihoods.base import Score
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.objectives import clip, guard
from rlflow.rl.optim import AdamW
from rlflow.types import Evidence, Rollout

Patch = pytest.MonkeyPatch


@dataclass
class Parts:
    policy: FlowPolicy
    collector: Collector
    algorithm: PolicyGradient

    def iterate(self, iteration: int = 0) -> dict[str, float]:
        return self.algorithm.update(self.collector.collect(iteration))

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.policy.parameters()])


def parts(kernel: Kernel | None = None, joint: bool = False, **settings: Any) -> Parts:
    torch.manual_seed(0)
    world = ToyImage(16)
    policy = FlowPolicy(MLPField(4, world.action_shape, width=12), kernel or FlowSDE(0.7), num_steps=5).double()
    likelihood, groups = ChainLikelihood("sum" if joint else "mean", joint), Groups(4, 4)
    walker = Collector(world, policy, likelihood, AllButLast(), groups)
    settings = {"optimizer": AdamW(lr=1e-2)} | settings
    return Parts(policy, walker, PolicyGradient(policy, likelihood, GroupAdvantage(), groups, **settings))


# -- checks: True where the number is right ---------------------------------------------------------


def first_ratio_is_1() -> bool:
    made = parts(kernel=LearnedNoise(4, (2,)), joint=True)
    return made.iterate()["policy/first_log_ratio_max"] < 1e-13


def second_ratio_is_not() -> bool:
    metrics = parts(epochs=2).iterate()
    return metrics["policy/approx_kl"] > 1e-12 and abs(metrics["policy/ratio_mean"] - 1) > 1e-12


def plain(reward: Tensor, **kwargs: Any) -> Rollout:
    """A rollout (T, B) that has rewards and ends, and nothing else."""
    done = torch.zeros_like(reward, dtype=torch.bool)
    usual = {"terminated": done, "truncated": done, "weight": torch.ones_like(reward)}
    usual |= {"group": torch.arange(reward.shape[1]) // 4, "row_ids": torch.arange(reward.numel()).view(reward.shape)}
    blank = {"obs": reward, "action": reward, "last_obs": reward[0], "final_obs": None}
    return Rollout(**blank, reward=reward, **(usual | kwargs))


REWARD = torch.randn(1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def big_group_ids_stay_apart() -> bool:
    ids = 2**24 + torch.arange(16) // 4
    small, big = (GroupAdvantage()(plain(REWARD, **g), None, None).advantage for g in ({}, {"group": ids}))
    return torch.equal(small, big)


def failed_rewards_are_absent() -> bool:
    weight = torch.ones_like(REWARD)
    weight[:, ::4] = 0.0
    broken = torch.where(weight > 0, REWARD, torch.nan)
    a = GroupAdvantage()(plain(broken, weight=weight), None, None).advantage[weight > 0]
    alone = {"group": torch.arange(12) // 3}
    return torch.allclose(a, GroupAdvantage()(plain(REWARD[weight > 0][None], **alone), None, None).advantage[0])


def a_time_limit_is_worth_its_next_value() -> bool:
    reward, value = torch.zeros(1, 4), torch.ones(1, 4)
    out = GAE(gamma=0.5, normalize=False)(plain(reward, truncated=value > 0), value, 10 * value)
    return out.advantage.tolist() == [[4.0] * 4]


def a_clipped_ratio_has_no_gradient() -> bool:
    log_ratio = torch.tensor([0.5, -0.5]).requires_grad_()
    clip.clipped_surrogate(log_ratio, torch.tensor([1.0, -1.0]), 0.1, 0.1).sum().backward()
    return not log_ratio.grad.any()


def micro_batches_change_nothing() -> bool:
    whole, split = parts(micro_batch=1000), parts(micro_batch=8)
    for made in (whole, split):
        rollout = made.collector.collect(0)
        rollout.weight[0, :3] = 0.0  # unequal numbers in the micro-batches
        made.algorithm.update(rollout)
    return torch.allclose(whole.weights(), split.weights(), rtol=0, atol=1e-9)


def the_average_does_not_lead() -> bool:
    slow, none = parts(ema_decay=0.99), parts(ema_decay=0.0)
    for i in range(2):
        slow.iterate(i), none.iterate(i)
    return torch.equal(slow.weights(), none.weights())


def the_reference_stays_behind() -> bool:
    made = parts(kl=KL(0.1))
    made.iterate(0)
    return made.iterate(1)["kl/ref"] > 1e-9


def the_reference_runs_once() -> bool:
    made = parts(kl=KL(0.1), epochs=3)
    made.iterate()
    return made.policy.network_rows == 16 * 5 + 16 * 4 + 3 * 16 * 4


def the_loss_is_the_policys_alone() -> bool:
    made, alone = parts(kl=KL(100.0)), parts()
    logged = []
    for m in (made, alone):
        rollout = m.collector.collect(0)
        with torch.no_grad():
            for p in m.policy.parameters():
                p += 0.01
        logged.append(m.algorithm.update(rollout)["policy/loss"])
    return logged[0] == pytest.approx(logged[1], abs=1e-12)


def guard_is_centred() -> bool:
    """Over 20,000 pairs of a small shift, whose plain log-ratios have a mean of -5 standard errors or more."""
    g = torch.Generator().manual_seed(0)
    noise, shift = torch.randn(20_000, 1, 8, generator=g), torch.full((20_000, 1, 8), 0.2)
    zero = torch.zeros(20_000, 1)
    old = Gaussian(torch.zeros_like(shift), torch.ones(20_000, 1, 1))
    new = Gaussian(shift, old.std)
    pairs = Evidence(noise, noise, zero, zero + 1, zero, old.mean, old.std, zero == 0)
    log_ratio = new.log_prob(noise, "mean", 2) - old.log_prob(noise, "mean", 2)
    guarded = guard.guard_log_ratio(log_ratio, Score(log_ratio, new), pairs, "mean")
    return bool(guarded.mean().abs() < 5 * guarded.std() / 20_000**0.5)


def every_row_keeps_its_place() -> bool:
    """Rows that teach nothing are weighted 0, not cut out, and the mean is over the others."""
    made = parts()
    rollout = made.collector.collect(0)
    rollout.reward[:, :8] = 1.0
    rows = made.policy.network_rows
    metrics = made.algorithm.update(rollout)
    return made.policy.network_rows - rows == 16 * 4 and metrics["advantage/used_frac"] == 0.5


def minibatches_differ_between_epochs() -> bool:
    learner = parts(num_minibatches=2).algorithm
    rollout = plain(REWARD)
    return len({tuple(learner._minibatches(rollout, epoch)[0].tolist()) for epoch in range(8)}) > 1


TABLE = Prompts(tuple({"prompt": str(i)} for i in range(16)))


def every_epoch_has_its_own_order() -> bool:
    order = TABLE.index(range(32), seed=0)
    return sorted(order[:16]) == sorted(order[16:]) == list(range(16)) and order[:16] != order[16:]


def a_picture_meets_its_own_prompt() -> bool:
    def error(images: Tensor, prompt: list[str]) -> Tensor:
        return -(images.mean((1, 2, 3)) - torch.tensor([float(p) for p in prompt])).abs()

    def tokenize(texts: list[str]) -> Tensor:
        return torch.tensor([float(t) for t in texts])

    env = PromptEnv(TABLE, RewardSet([Reward("error", error)]), 8, (3, 2, 2), tokenize, lambda x: x)
    obs = env.reset(torch.arange(8))
    for start in (0, 4):
        env.send(obs[start : start + 4, None, None, None].expand(4, 3, 2, 2), slice(start, start + 4))
    return not env.recv().reward.any()


# -- mutants ------------------------------------------------------------------------------------------


def scoring_grid(patch: Patch) -> None:
    """Released ReinFlow samples on linspace(0, 1, K) and scores on linspace(0, 1 - 1/K, K)."""
    score = ChainLikelihood.score

    def mutant(self: Any, policy: Any, cond: Any, evidence: Any) -> Any:
        return score(self, policy, cond, replace(evidence, t=0.8 * evidence.t, t_next=0.8 * evidence.t_next))

    patch.setattr(ChainLikelihood, "score", mutant)


def old_from_new(patch: Patch) -> None:
    """old = new.detach(): the first ratio cannot tell, the second epoch's can."""
    score = ChainLikelihood.score

    def mutant(self: Any, policy: Any, cond: Any, evidence: Any) -> Any:
        found = score(self, policy, cond, evidence)
        evidence.old_log_prob.copy_(found.log_prob.detach())
        return found

    patch.setattr(ChainLikelihood, "score", mutant)


def old_from_new_in_the_ratio(patch: Patch) -> None:
    patch.setattr(ChainLikelihood, "log_ratio", lambda self, log_prob, evidence: log_prob - log_prob.detach())


def old_in_single_precision(patch: Patch) -> None:
    record = ChainLikelihood.record

    def mutant(self: Any, policy: Any, cond: Any, chain: Any, key: Any, row_ids: Any) -> Any:
        found = record(self, policy, cond, chain, key, row_ids)
        return replace(found, old_log_prob=found.old_log_prob.float().double())

    patch.setattr(ChainLikelihood, "record", mutant)


def another_rows_sample(patch: Patch) -> None:
    record = ChainLikelihood.record

    def mutant(self: Any, policy: Any, cond: Any, chain: Any, key: Any, row_ids: Any) -> Any:
        rolled = replace(chain, x=chain.x.roll(1, 0), x_next=chain.x_next.roll(1, 0))
        return record(self, policy, cond, rolled, key, row_ids)

    patch.setattr(ChainLikelihood, "record", mutant)


def float_group_ids(patch: Patch) -> None:
    moments = advantages.group_moments
    patch.setattr(advantages, "group_moments", lambda value, weight, group: moments(value, weight, group.float()))


def failed_is_zero(patch: Patch) -> None:
    """A reward that could not be had becomes 0 and enters the mean of its group."""
    moments = advantages.group_moments

    def mutant(value: Tensor, weight: Tensor, group: Tensor) -> Any:
        return moments(value.nan_to_num(0.0), torch.ones_like(weight), group)

    patch.setattr(advantages, "group_moments", mutant)


def time_limit_is_terminal(patch: Patch) -> None:
    gae = advantages.gae

    def mutant(reward: Any, value: Any, after: Any, terminated: Any, truncated: Any, *rest: float) -> Tensor:
        return gae(reward, value, after, terminated | truncated, truncated, *rest)

    patch.setattr(advantages, "gae", mutant)


def optimistic_bound(patch: Patch) -> None:
    def mutant(log_ratio: Tensor, a: Tensor, low: float, high: float) -> Tensor:
        ratio = log_ratio.exp()
        return torch.minimum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))

    patch.setattr(clip, "clipped_surrogate", mutant)


def mean_of_micro_batch_means(patch: Patch) -> None:
    """Each micro-batch is divided by the number of its own rows that count, not of the minibatch's."""
    loss = Loss.of_objective

    def mutant(self: Any, score: Any, evidence: Any, of: Any, pairs: Any, log: Any) -> Tensor:
        own = of.pair_weight(pairs, joint=False).sum().clamp(min=1)
        return loss(self, score, evidence, of, pairs, log) * log.denominator(False) / own

    patch.setattr(Loss, "of_objective", mutant)


def average_overwrites_live(patch: Patch) -> None:
    blend = WeightSets.blend

    def mutant(self: WeightSets, name: str, decay: float) -> None:
        blend(self, name, decay)
        for n, p in self.parameters().items():
            p.data.copy_(self.sets[name][n])

    patch.setattr(WeightSets, "blend", mutant)


def reference_is_live(patch: Patch) -> None:
    patch.setattr(FlowPolicy, "using", lambda self, name: nullcontext(self))


def reference_in_the_loop(patch: Patch) -> None:
    score = ChainLikelihood.score

    def mutant(self: Any, policy: Any, cond: Any, evidence: Any) -> Any:
        with policy.using("ref"):
            score(self, policy, cond, evidence)
        return score(self, policy, cond, evidence)

    patch.setattr(ChainLikelihood, "score", mutant)


def kl_in_the_logged_loss(patch: Patch) -> None:
    add = batch.Meter.add

    def mutant(self: Any, name: str, value: Tensor) -> None:
        add(self, "policy/loss" if name == "kl/ref" else name, value)

    patch.setattr(batch.Meter, "add", mutant)


def guard_without_centring(patch: Patch) -> None:
    patch.setattr(guard, "mean_shift", lambda score, evidence, reduce: torch.zeros_like(score.log_prob))


def idle_rows_dropped(patch: Patch) -> None:
    """Rows of zero advantage are cut out, which changes the size of a minibatch."""
    step = PolicyGradient._minibatch

    def mutant(self: Any, of: Any, rows: Tensor, log: Any, first: bool) -> None:
        step(self, of, rows[of.row_weight[rows] > 0], log, first)

    patch.setattr(PolicyGradient, "_minibatch", mutant)


def one_shuffle_for_all(patch: Patch) -> None:
    generator = policy_gradient.generator
    patch.setattr(policy_gradient, "generator", lambda *parts: generator("minibatch"))


def one_order_for_all(patch: Patch) -> None:
    from rlflow.envs import prompts

    generator = prompts.generator
    patch.setattr(prompts, "_order", prompts._order.__wrapped__)  # the last orders are kept
    patch.setattr(prompts, "generator", lambda name, seed, epoch: generator(name, seed, 0))


def prompts_of_the_first_rows(patch: Patch) -> None:
    """Each micro-batch is judged against the prompts from row 0 on."""
    send = PromptEnv.send

    def mutant(self: PromptEnv, action: Tensor, rows: slice) -> None:
        kept, self.rows = self.rows, (self.rows[: rows.stop - rows.start] * 2)[: len(self.rows)]
        send(self, action, rows)
        self.rows = kept

    patch.setattr(PromptEnv, "send", mutant)


MUTANTS: dict[Callable[[Patch], None], Callable[[], bool]] = {
    scoring_grid: first_ratio_is_1,
    old_in_single_precision: first_ratio_is_1,
    another_rows_sample: first_ratio_is_1,
    old_from_new: second_ratio_is_not,
    old_from_new_in_the_ratio: second_ratio_is_not,
    float_group_ids: big_group_ids_stay_apart,
    failed_is_zero: failed_rewards_are_absent,
    time_limit_is_terminal: a_time_limit_is_worth_its_next_value,
    optimistic_bound: a_clipped_ratio_has_no_gradient,
    mean_of_micro_batch_means: micro_batches_change_nothing,
    average_overwrites_live: the_average_does_not_lead,
    reference_is_live: the_reference_stays_behind,
    reference_in_the_loop: the_reference_runs_once,
    kl_in_the_logged_loss: the_loss_is_the_policys_alone,
    guard_without_centring: guard_is_centred,
    idle_rows_dropped: every_row_keeps_its_place,
    one_shuffle_for_all: minibatches_differ_between_epochs,
    one_order_for_all: every_epoch_has_its_own_order,
    prompts_of_the_first_rows: a_picture_meets_its_own_prompt,
}


@pytest.mark.parametrize("check", dict.fromkeys(MUTANTS.values()), ids=lambda f: f.__name__)
def test_the_code_as_it_is_passes(check):
    assert check()


@pytest.mark.parametrize(("mutant", "check"), MUTANTS.items(), ids=lambda f: f.__name__)
def test_the_mutant_is_caught(mutant, check, monkeypatch):
    mutant(monkeypatch)
    assert not check()


@pytest.mark.parametrize("mutant", [old_from_new, old_from_new_in_the_ratio], ids=lambda f: f.__name__)
def test_the_first_ratio_acquits_it(mutant, monkeypatch):
    """Which is why a second number is needed."""
    mutant(monkeypatch)
    assert first_ratio_is_1()
