"""One real iteration under observation: what it measured, its gradients, and the network alone at its shapes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from rlflow.assembly.parts import Parts
from rlflow.cost.formula import Cost
from rlflow.flow.noise import generator
from rlflow.flow.policy import FlowPolicy
from rlflow.rl.batch import cond_of
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.types import Rollout


class Probe:
    """One real iteration, and what it left behind."""

    def __init__(self, parts: Parts, iteration: int):
        self.parts, cost, start = parts, parts.policy.network_cost, time.perf_counter()
        rollout = self.rollout = parts.collector.collect(iteration)
        middle = time.perf_counter()
        self.masked = 1 - float(rollout.weight.mean())
        self.reward_mean = float(torch.where(rollout.weight > 0, rollout.reward, 0).sum() / rollout.weight.sum())
        self.replaced = not self._teaches()
        if self.replaced:
            _random_rewards(rollout, iteration)
        self.metrics = parts.collector.env.metrics() | parts.algorithm.update(rollout)
        self.seconds = {"rollout": middle - start, "update": time.perf_counter() - middle}
        self.network_rows = parts.policy.network_cost - cost

    def _teaches(self) -> bool:
        algorithm = self.parts.algorithm
        if not isinstance(algorithm, PolicyGradient) or algorithm.advantage.needs_critic:
            return True
        return bool((algorithm.advantage(self.rollout, None, None).weight > 0).any())


def _random_rewards(rollout: Rollout, iteration: int) -> None:
    """Rewards that differ, where the few real ones are all alike: the update has to be seen at work."""
    rng = generator("doctor", iteration)
    rollout.reward = torch.randn(rollout.reward.shape, generator=rng).to(rollout.reward)
    rollout.reward_parts = {n: rollout.reward.clone() for n in rollout.reward_parts}
    rollout.weight = torch.ones_like(rollout.weight)


class GradientWatch:
    """Sees every gradient of a policy as it is accumulated."""

    def __init__(self, policy: FlowPolicy):
        named = policy.weights.parameters()
        self.finite, self.not_zero = dict.fromkeys(named, True), dict.fromkeys(named, False)
        self.handles = [p.register_post_accumulate_grad_hook(self._hook(name)) for name, p in named.items()]

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def see(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.finite[name] &= bool(parameter.grad.isfinite().all())
            self.not_zero[name] |= bool((parameter.grad != 0).any())

        return see

    def close(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()


def _states(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Where the network was asked, x (N, R, *D) and t (N, R); of a rollout without evidence, the chains' ends."""
    if rollout.evidence is not None:
        return rollout.evidence.x, rollout.evidence.t
    x = rollout.flat(rollout.action).unsqueeze(1)
    return x, x.new_zeros(x.shape[:2])


@torch.no_grad()
def two_passes(probe: Probe, num: int = 8) -> float:
    """Largest difference of the network's answers to one input given twice, over their root mean square."""
    policy, rollout = probe.parts.policy, probe.rollout
    x, t = (v[:num, 0] for v in _states(rollout))
    cond = cond_of(policy, rollout, torch.arange(len(x), device=policy.device))
    first, again = (policy.velocity(x, t, torch.zeros_like(t), cond) for _ in range(2))
    return float((first - again).abs().max() / first.square().mean().sqrt())


def bare_seconds(parts: Parts, probe: Probe, cost: Cost) -> float:
    """Seconds of the network alone, at the shapes of the rollout and of the update."""
    policy, rollout = parts.policy, probe.rollout
    x_of, t_of = _states(rollout)

    def seconds_per_row(rows: Tensor, train: bool) -> float:
        x, t = (v[rows].flatten(0, 1) for v in (x_of, t_of))
        each = torch.arange(len(rows), device=rows.device).repeat_interleave(t_of.shape[1])
        start = time.perf_counter()
        with torch.set_grad_enabled(train):
            v = policy.velocity(x, t, torch.zeros_like(t), cond_of(policy, rollout, rows).index(each))
            if train:
                v.float().square().mean().backward()
        return (time.perf_counter() - start) / (len(x) * policy.field.calls)

    rows = torch.arange(probe.rollout.num_rows, device=policy.device)
    sizes = {False: parts.collector.rows_per_call, True: parts.algorithm.micro_batch}
    parts_of = {train: rows[: max(1, size // t_of.shape[1])] for train, size in sizes.items()}
    forward, both = (min(seconds_per_row(part, train) for _ in range(3)) for train, part in parts_of.items())
    parts.algorithm.optimizer.zero_grad()
    return (cost.rollout + cost.reference) * forward + cost.update / 3 * both
