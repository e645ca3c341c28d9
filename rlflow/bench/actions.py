"""What an action of a policy costs: milliseconds from observations to actions, by denoising steps and batch.

The observations are those that the policy itself comes to in its environment, since an adaptive solver's steps depend
on them; the clock is CPU time, which other work on the machine lengthens little.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlflow.bench.stopwatch import Times, num_threads
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import Adaptive, Euler, Solver
from rlflow.models.io import load_field, read_config
from rlflow.pretrain.adaptive import played
from rlflow.pretrain.cloning import make_env
from rlflow.types import Tree, num_rows, tree_map

MOST = 10
"""Steps of the adaptive solver."""


def ways(policy: FlowPolicy, eta: float) -> dict[str, tuple[int, Solver]]:
    """(most steps, solver) by name: one, two and four steps, and adaptive ones where the field has a spread head."""
    found: dict[str, tuple[int, Solver]] = {f"K={k}": (k, Euler()) for k in (1, 2, 4)}
    return found | ({f"adaptive {eta:g}": (MOST, Adaptive(eta))} if policy.field.has_spread else {})


@torch.no_grad()
def bench_actions(
    checkpoint: str,
    eta: float = 0.2,
    batches: tuple[int, ...] = (1, 64),
    calls: int = 100,
    chunks: int = 12,
    trust_code: bool = False,
) -> dict[str, Any]:
    """{"cpu_ms": {way: {batch: median}}, "calls": {way: network rows of an action}} of a cloned policy, one thread."""
    about = read_config(checkpoint).get("judged_by", {})
    if about.get("env", {}).get("name", "prompt") == "prompt":
        raise ValueError(f"{checkpoint} does not name the simulator that it acts in")
    policy = FlowPolicy(load_field(checkpoint, trust_code), FlowSDE(), num_steps=about["policy"]["num_steps"])
    obs = played(policy, make_env(about["env"], max(batches), trust_code), chunks)[0]
    known, times = ways(policy, eta), Times()
    rows: dict[str, float] = {}
    with num_threads(1):
        for name, (k, solver) in known.items():
            policy.solver = solver
            before = policy.network_rows
            policy.sample(policy.encode(obs), policy.plan(k), key=Key(0, "calls"))
            rows[name] = (policy.network_rows - before) / num_rows(obs)
        for call in range(calls):
            for name, (k, solver) in known.items():
                policy.solver = solver
                for batch in batches:
                    some = drawn(obs, batch, call)
                    times.run(f"{name} {batch}", lambda i: act(policy, some, k, i), call)  # noqa: B023
    told = {n: {f"batch_{b}": round(1e3 * times.median(f"{n} {b}", "cpu"), 3) for b in batches} for n in known}
    return {"cpu_ms": told, "calls": {name: round(number, 2) for name, number in rows.items()}}


def drawn(obs: Tree, num: int, seed: int) -> Tree:
    """`num` of the observations."""
    index = torch.randint(num_rows(obs), (num,), generator=torch.Generator().manual_seed(seed))
    return tree_map(lambda v: v[index], obs)


def act(policy: FlowPolicy, obs: Tree, num_steps: int, call: int) -> Tensor:
    """Actions (N, *D)."""
    chain = policy.sample(policy.encode(obs), policy.plan(num_steps), key=Key(0, "latency", 0, call))
    return policy.squash(chain.final)
