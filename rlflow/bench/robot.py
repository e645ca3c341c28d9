"""What robots cost: environment steps, a ReinFlow iteration by phase, the latency of an action, a plain loop as peer.

An iteration is the collector and the learner of training on Hopper, from an untrained policy: its robots fall after
about twenty steps, so more episodes begin than in a real run. Phases are told by the wall clock: simulate (the
environment), policy (encoding and sampling), update (the learner), other (the rest).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from rlflow.bench.envs import TASKS, Player, bench_envs
from rlflow.bench.passes import Bare, listen
from rlflow.bench.size import PAPER, Size
from rlflow.bench.stopwatch import Phases, Times
from rlflow.envs.base import VecEnv
from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators.mujoco import HOPPER, MujocoSim
from rlflow.flow.kernels import LearnedNoise
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import All
from rlflow.models.mlp import MLPField
from rlflow.rl.advantages import GAE
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.objectives.clip import Clip
from rlflow.rl.optim import AdamW
from rlflow.rl.recorded import unrecorded

GAMMA = 0.9975  # .99 for a chunk of four


def flow_policy(env: VecEnv, width: int, depth: int, num_steps: int) -> FlowPolicy:
    """An untrained MLP flow policy with learned noise for an environment of vector observations."""
    torch.manual_seed(0)
    field = MLPField(env.obs_dim, env.action_shape, width, depth).to(env.device)
    kernel = LearnedNoise(field.num_features, tuple(env.action_shape), 0.10, 0.24).to(env.device)
    return FlowPolicy(field, kernel, num_steps=num_steps)


class ReinFlow:
    """Iterations through the collector and the learner, as in training."""

    def __init__(self, size: Size, threads: int = 0) -> None:
        env = SimEnv(MujocoSim(HOPPER, size.num_envs, threads), size.chunk, GAMMA)
        groups, likelihood = Groups(size.num_envs, 1), ChainLikelihood("sum", joint=True)
        self.policy = flow_policy(env, size.width, size.depth, size.num_steps)
        self.collector = Collector(
            env,
            self.policy,
            likelihood,
            All(),
            groups,
            horizon=size.num_chunks,
            mode="steps",
            rows_per_call=env.num_envs,
        )
        rows = size.num_envs * size.num_chunks // size.num_minibatches
        self.algorithm = PolicyGradient(
            self.policy,
            likelihood,
            GAE(gamma=GAMMA),
            groups,
            optimizer=AdamW(lr=1e-4),
            objective=Clip(likelihood, low=0.2),
            epochs=size.epochs,
            num_minibatches=size.num_minibatches,
            micro_batch=rows * size.num_steps,
            entropy=0.03,
        )
        self.phases, self.env_steps, self.first_log_ratio = Phases(), 0, 0.0
        for owner, method, phase in (
            (env, "reset", "simulate"),
            (env, "recv", "simulate"),
            (self.policy, "encode", "policy"),
            (self.policy, "sample", "policy"),
            (self.algorithm, "update", "update"),
        ):
            self.phases.listen(owner, method, phase)

    def __call__(self, iteration: int) -> None:
        """Rollout and update."""
        rollout = self.collector.collect(iteration)
        assert rollout.num_steps is not None
        metrics = self.algorithm.update(rollout)
        self.env_steps += int(rollout.num_steps.sum())
        self.first_log_ratio = max(self.first_log_ratio, metrics["policy/first_log_ratio_max"])


def bench_iteration(size: Size, repeats: int, threads: int = 0) -> dict[str, Any]:
    """Seconds of an iteration, its phases, and the share of its bare network passes in its CPU time."""
    real, times = ReinFlow(size, threads), Times()
    with unrecorded():
        passes = listen(real.policy.field, lambda: real(0))  # a warm-up
    bare = Bare(real.policy.field, None, passes, torch.zeros(1, *real.collector.env.obs_spec.shape))
    bare(0)
    real.phases.seconds, real.env_steps = {}, 0
    for iteration in range(1, 1 + repeats):
        times.run("real", real, iteration)
        times.run("bare", bare, iteration)
    total = sum(sample.wall for sample in times.samples["real"])
    return {
        "s_per_iteration": times.median("real"),
        "env_steps_per_s": real.env_steps / total,
        "network_share": times.ratio("bare", "real", statistics.median, "cpu"),
        "phases": real.phases.shares(total),
        "first_log_ratio_max": real.first_log_ratio,
        "size": asdict(size),
    }


def acting(env: SimEnv, policy: FlowPolicy) -> Player:
    """One chunk of every row by the policy, its noise on; for environments on any device."""
    plan_of, grid, ids = All(), policy.grid(policy.num_steps), torch.arange(env.num_envs)
    obs, count = env.reset(ids), 0

    @torch.no_grad()
    def step() -> torch.Tensor:
        nonlocal obs, count
        chain = policy.sample(policy.encode(obs), plan_of(0, grid, ids), key=Key(0, "bench", 0, count), row_ids=ids)
        done = env.step(policy.squash(chain.final))
        obs, count = done.obs, count + 1
        assert done.num_steps is not None
        return done.num_steps.sum()

    return step


@torch.no_grad()
def latency(size: Size, steps: list[int], batches: list[int], calls: int) -> dict[str, dict[str, float]]:
    """Milliseconds from observations to actions, noise off: the median, by denoising steps and batch."""
    env = SimEnv(MujocoSim(HOPPER, 1), size.chunk)
    policy, times = flow_policy(env, size.width, size.depth, size.num_steps), Times()

    def act(k: int, batch: int) -> Callable[[int], None]:
        obs, ids = torch.randn(batch, env.obs_dim), torch.arange(batch)

        def once(call: int) -> None:
            cond = policy.encode(obs)
            policy.squash(policy.sample(cond, policy.plan(k), key=Key(0, "latency", 0, call), row_ids=ids).final)

        return once

    cases = {(k, batch): act(k, batch) for k in steps for batch in batches}
    for call in range(calls):
        for (k, batch), once in cases.items():
            times.run(f"{k} {batch}", once, call)
    return {f"K={k}": {f"batch_{b}": 1e3 * times.median(f"{k} {b}") for b in batches} for k in steps}


def bench_paper(size: Size = PAPER, threads: int = 0) -> dict[str, Any]:
    """An iteration of the published size beside the same of a plain loop; minutes, for the loop scores all tenfold."""
    from rlflow.bench.peer import PlainLoop

    peer = PlainLoop(size)
    contenders: dict[str, ReinFlow | PlainLoop] = {"ours": ReinFlow(size, threads), "plain_loop": peer}
    out: dict[str, Any] = {"size": asdict(size)}
    for name, run in contenders.items():
        begin = time.perf_counter()
        run(0)
        seconds = time.perf_counter() - begin
        out[name] = {"s_per_iteration": seconds, "env_steps_per_s": run.env_steps / seconds}
        out[name]["seconds"] = {n: share * seconds for n, share in run.phases.shares(seconds).items()}
    peer.close()
    out["ratio"] = out["plain_loop"]["s_per_iteration"] / out["ours"]["s_per_iteration"]
    return out


def bench_robot(
    paper: bool = False,
    seconds: float = 1.0,
    repeats: int = 3,
    tasks: tuple[str, ...] = tuple(TASKS),
    num_envs: tuple[int, ...] = (1, 16, 64),
    size: Size | None = None,
    threads: int = 0,
) -> dict[str, Any]:
    """Environments, an iteration, latency, and with `paper` the published size; about three minutes without it.

    `env_steps_per_s` is that of the first task at the most rows, without a policy.
    """
    size = size or Size()
    rows = [bench_envs(name, num, size.chunk, threads, seconds, repeats) for name in tasks for num in num_envs]
    iteration = bench_iteration(size, repeats, threads)
    out: dict[str, Any] = {
        "env_steps_per_s": rows[len(num_envs) - 1]["ours"]["env_steps_per_s"],
        "s_per_iteration": iteration["s_per_iteration"],
        "network_share": iteration["network_share"],
        "envs": rows,
        "iteration": iteration,
        "latency_ms": latency(size, [1, 2, 4], [1, 64], calls=20 * repeats),
    }
    if paper:
        out["paper"] = bench_paper(threads=threads)
    host = {"threads": torch.get_num_threads(), "cpus": os.cpu_count(), "load_1min": os.getloadavg()[0]}
    return out | {"setting": host | {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}}
