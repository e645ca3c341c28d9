"""What doctor asks of one learner and not of another, chosen by the type of the `algorithm` section."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlflow import registry
from rlflow.assembly.parts import Parts
from rlflow.assembly.policy import make_policy
from rlflow.config.algorithms import AlgorithmConfig, RewardGradientConfig, SACConfig
from rlflow.config.schema import Config
from rlflow.config.steps import make_steps
from rlflow.doctor.check import Check
from rlflow.doctor.density import euler_log_prob
from rlflow.doctor.probe import Probe
from rlflow.flow.solvers import Euler
from rlflow.ranges import LARGEST
from rlflow.rl.batch import Batch
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.rl.learners.reward_gradient import RewardGradient
from rlflow.rl.likelihoods.cfm import calibration
from rlflow.rl.off_policy.path_entropy import highest_entropy
from rlflow.rl.off_policy.sac import SAC

ROUNDED_LOG_RATIO = 1e-2
"""Largest first log-ratio that passes where a row rounds differently beside others: a GPU's kernels go by the size of a
batch, and texts are padded to the longest of it."""
LARGEST_DENSITY = 32
"""Numbers of an action up to which the density of a noise-free chain is computed."""
FEW_GROUPS = 4
"""Of an iteration of reward gradients."""
FEW_NUMBERS, DIFFERENCE, GRADIENT_ERROR = 7, 1e-2, 0.1
"""Numbers of a sample whose gradient is checked, by how much each is moved up and down, and the error that passes.

Their median: where a picture is cut off at black or white a difference is of both sides of an edge."""
FEW_DECISIONS = 16
"""Batch of an off-policy learner's optimiser step."""


def of_the_learner(config: Config, parts: Parts, probe: Probe, trust_code: bool) -> list[Check]:
    """Checks of this learner only."""
    return CHECKS[type(config.algorithm)](config, parts, probe, trust_code)


def few_updates(config: Config, group_size: int, trust_code: bool) -> tuple[int, Any]:
    """(number of groups, `algorithm` section) of an iteration on a few rows."""
    if type(config.algorithm) not in FEW:
        raise ValueError(f"algorithm: doctor has no checks of {config.algorithm.name}")
    return FEW[type(config.algorithm)](config, group_size, trust_code)


def at_work(config: Config) -> Any:
    """The `algorithm` section with its first iteration like all others: nothing is waited for."""
    c = config.algorithm
    if not isinstance(c, SACConfig):
        return c
    return replace(c, start=0, offline=None if c.offline is None else replace(c.offline, clone=0, updates=0))


# -- ratios ---------------------------------------------------------------------------------------


def _ratio_checks(config: Config, parts: Parts, probe: Probe, trust_code: bool) -> list[Check]:
    surrogate = calibrated(config, probe, trust_code)
    return [_first_log_ratio(probe), _ratio_moves(probe), *surrogate, _kappa(config, parts)]


def _few_with_ratios(config: Config, group_size: int, trust_code: bool) -> tuple[int, AlgorithmConfig]:
    c = config.algorithm
    assert isinstance(c, AlgorithmConfig)
    rows_of_a_score = group_size - 1 or 2
    micro_batch = min(c.micro_batch, rows_of_a_score * _columns(config, trust_code))
    groups = c.num_minibatches * -(-2 // c.num_minibatches)
    return groups, replace(c, micro_batch=micro_batch, critic_warmup=0)


def _columns(config: Config, trust_code: bool) -> int:
    """R, the columns of a sample's evidence."""
    likelihood = registry.build("likelihood", "likelihood", config.likelihood, trust_code=trust_code)
    steps = make_steps(config, trust_code)
    grid = torch.linspace(0, 1, config.policy.num_steps + 1, dtype=torch.float64)
    return max(1, likelihood.num_columns(steps(0, grid, torch.zeros(1, dtype=torch.long))))


def _first_log_ratio(probe: Probe) -> Check:
    worst = probe.metrics["policy/first_log_ratio_max"]
    prefix = "policy/first_log_ratio/"
    found = {int(k.removeprefix(prefix)): v for k, v in probe.metrics.items() if k.startswith(prefix)}
    by_step = [found[k] for k in sorted(found)]
    policy = probe.parts.policy
    limit = ROUNDED_LOG_RATIO if policy.field.ragged or policy.device.type != "cpu" else 0
    detail = "largest |log ratio| before any update, by scored step: " + " ".join(f"{v:.2g}" for v in by_step)
    if policy.field.ragged:
        detail += "; not exactly 0: texts are padded to the longest beside them, which differs when they are scored"
    return Check("first log-ratio", worst, f"<= {limit:g}" if limit else "0", worst <= limit, detail)


@torch.no_grad()
def _ratio_moves(probe: Probe) -> Check:
    algorithm, policy = probe.parts.algorithm, probe.parts.policy
    assert isinstance(algorithm, PolicyGradient)
    batch = Batch(policy, probe.rollout)
    rows = torch.arange(probe.rollout.num_rows, device=policy.device)
    worst: list[Tensor] = []
    for part in rows.split(max(1, algorithm.micro_batch // batch.num_columns)):
        evidence = batch.evidence.index(part)
        score = algorithm.likelihood.score(policy, batch.cond(part), evidence)
        worst.append((score.log_prob - evidence.old_log_prob).abs().amax())
    value = float(torch.stack(worst).max())
    detail = "largest |log ratio| of the same samples after one update: 0 would mean that nothing is learnt from"
    return Check("log-ratio after one update", value, "> 0", math.isfinite(value) and value > 0, detail)


@torch.no_grad()
def calibrated(config: Config, probe: Probe, trust_code: bool) -> list[Check]:
    """How a surrogate's log-ratio stands to the exact one after the update, where the samples' density is known."""
    policy, algorithm = probe.parts.policy, probe.parts.algorithm
    assert isinstance(algorithm, PolicyGradient)
    likelihood, small = algorithm.likelihood, math.prod(policy.event_shape) <= LARGEST_DENSITY
    if likelihood.scores_steps or not small or not isinstance(policy.solver, Euler):
        return []
    batch, rows = Batch(policy, probe.rollout), torch.arange(min(64, probe.rollout.num_rows), device=policy.device)
    cond, evidence = batch.cond(rows), batch.evidence.index(rows)
    old = make_policy(replace(config, policy=replace(config.policy, max_kappa=LARGEST)), trust_code)
    ratio = likelihood.log_ratio(likelihood.score(policy, cond, evidence).log_prob, evidence).mean(1)
    exact = euler_log_prob(policy, evidence.x_next[:, 0], cond) - euler_log_prob(old, evidence.x_next[:, 0], cond)
    known = exact.isfinite()
    if not bool(known.any()):
        return []
    slope, correlation = calibration(ratio[known], exact[known])
    detail = f"the surrogate's log-ratio for 1 nat of the exact one, after one update; correlation {correlation:.2f} "
    detail += f"over {int(known.sum())} samples"
    if (high := algorithm.objective.largest_log_ratio) is not None:
        nats = high / slope if slope > 0 else math.inf
        detail += f"; the clip of {math.expm1(high):g} stands for {nats:.2g} nats"
    return [Check("calibration of the ratio", slope, detail=detail + "; no bound: it depends on the policy's width")]


def _kappa(config: Config, parts: Parts) -> Check:
    policy = parts.policy
    grid = policy.grid(policy.num_steps)
    kappa = policy.kappa(grid[:-1], grid[1:])
    steps = list(parts.collector.steps.possible(policy.num_steps))
    if not steps:
        return Check("kappa", 0.0, detail="no step is scored, so no noise of the network is divided by a std")
    value = max(float(kappa[k]) for k in steps)
    detail = "|dmean/dv| / std by step that can be scored: " + " ".join(f"{k}:{float(kappa[k]):.2g}" for k in steps)
    return Check("kappa", value, f"<= {config.policy.max_kappa:g}", value <= config.policy.max_kappa, detail)


# -- off-policy -----------------------------------------------------------------------------------


def _off_policy_checks(config: Config, parts: Parts, probe: Probe, trust_code: bool) -> list[Check]:
    algorithm, num = parts.algorithm, math.prod(parts.policy.event_shape)
    assert isinstance(algorithm, SAC)
    target, highest = algorithm.temperature.target / num, highest_entropy(parts.policy) / num
    found = probe.metrics["policy/entropy"] / num
    detail = (
        f"nats per number that the path's entropy is to have; now {found:.3g}. The bound is what the noise can give"
    )
    loss = probe.metrics["critic/loss"]
    steps = f"mean squared error of the critics over {algorithm.updates} optimiser steps"
    return [
        Check("entropy target", target, f"< {highest:.3g}", target < highest, detail),
        Check("critic loss", loss, "finite", math.isfinite(loss), steps),
    ]


def _few_off_policy(config: Config, group_size: int, trust_code: bool) -> tuple[int, SACConfig]:
    c = config.algorithm
    assert isinstance(c, SACConfig)
    few: dict[str, Any] = {
        "start": 0,
        "capacity": 10_000,
        "batch_size": FEW_DECISIONS,
        "updates_per_step": 0.5,
        "actor_every": 1,
    }
    offline = None if c.offline is None else replace(c.offline, clone=FEW_DECISIONS, updates=0)
    return 2, replace(c, **few, offline=offline)


# -- reward gradients -----------------------------------------------------------------------------


def _gradient_checks(config: Config, parts: Parts, probe: Probe, trust_code: bool) -> list[Check]:
    """The reward's gradient by the numbers of a sample that it depends on most, against differences of the reward."""
    algorithm, policy = parts.algorithm, parts.policy
    assert isinstance(algorithm, RewardGradient)
    x = policy.squash(probe.rollout.flat(probe.rollout.action)[:1])
    row = torch.zeros(1, dtype=torch.long, device=policy.device)
    found, differences = gradient_and_differences(lambda x: algorithm.reward(x, row.expand(len(x))), x)
    error = float((found - differences).abs().median() / found.abs().max().clamp(min=1e-12))
    pairs = zip(found.tolist(), differences.tolist(), strict=True)
    detail = "median error of the reward's gradient by a sample's numbers, over their size; it and the differences: "
    detail += ", ".join(f"{a:.3g} / {b:.3g}" for a, b in pairs)
    return [Check("reward gradient", error, f"<= {GRADIENT_ERROR:g}", error <= GRADIENT_ERROR, detail)]


def gradient_and_differences(reward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (P,) of reward((1, *D)) at its P largest entries, and central differences there."""
    x = x.detach().requires_grad_()
    (whole,) = torch.autograd.grad(reward(x).sum(), x)
    largest = whole.flatten().abs().topk(min(FEW_NUMBERS, whole.numel())).indices
    step = torch.zeros(len(largest), whole.numel()).to(x)
    step[torch.arange(len(largest)), largest] = DIFFERENCE
    up, down = (reward((x + sign * step.view(-1, *x.shape[1:])).detach().requires_grad_()).detach() for sign in (1, -1))
    return whole.flatten()[largest], (up - down) / (2 * DIFFERENCE)


def _few_gradients(config: Config, group_size: int, trust_code: bool) -> tuple[int, RewardGradientConfig]:
    c = config.algorithm
    assert isinstance(c, RewardGradientConfig)
    return FEW_GROUPS, replace(c, micro_batch=min(c.micro_batch, FEW_GROUPS * group_size - 1))


CHECKS: dict[type, Callable[[Config, Parts, Probe, bool], list[Check]]] = {
    AlgorithmConfig: _ratio_checks,
    SACConfig: _off_policy_checks,
    RewardGradientConfig: _gradient_checks,
}
FEW: dict[type, Callable[[Config, int, bool], tuple[int, Any]]] = {
    AlgorithmConfig: _few_with_ratios,
    SACConfig: _few_off_policy,
    RewardGradientConfig: _few_gradients,
}
