"""Tiny random pi0, pi0.5 and SmolVLA of the real LeRobot behind rlflow's adapter; in an environment of Python 3.12:

    pip install 'lerobot[smolvla,pi]==0.6.1' -e '.[robots]' && python scripts/check_lerobot.py

Says, for each, how far our chain without noise is from LeRobot's own loop, the first log-ratio of an update, and how
far plain LeRobot, with the policy loaded back from disk, is from ours after that update. Fails above 1e-4.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlflow.flow.kernels import FlowSDE
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import OneRandom
from rlflow.models.lerobot import tiny
from rlflow.models.lerobot.export import save_policy
from rlflow.models.lerobot.field import LeRobotField
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.types import Tree

ROWS, STEPS, LIMIT = 4, 4, 1e-4


@torch.no_grad()
def ours(policy: FlowPolicy, obs: Tree, noise: Tensor) -> Tensor:
    """Actions of our chain without noise."""
    return policy.sample(policy.encode(obs), x_0=noise).final[..., :6]


@torch.no_grad()
def theirs(policy: Any, obs: Tree, noise: Tensor) -> Tensor:
    """Actions of LeRobot's loop from the same start."""
    policy.reset()
    return policy.predict_action_chunk(dict(obs), noise=noise)


def check(name: str, make: Callable[[], Any]) -> float:
    """The largest of the three figures, which are printed."""
    torch.manual_seed(0)
    field, obs = LeRobotField(make(), tiny.batch(ROWS)), tiny.batch(ROWS)
    policy, likelihood = FlowPolicy(field, FlowSDE(0.5), num_steps=STEPS), ChainLikelihood("sum")
    noise = torch.randn(ROWS, *field.event_shape)
    border = (ours(policy, obs, noise) - theirs(field.policy, obs, noise)).abs().max().item()
    plan, ids = OneRandom(skip_last=0)(0, policy.grid(STEPS), torch.arange(ROWS)), torch.arange(ROWS)
    with torch.no_grad():
        cond = policy.encode(obs)
        evidence = likelihood.record(policy, cond, policy.sample(cond, plan), Key(0, "check"), ids)
    log_prob = likelihood.score(policy, cond, evidence).log_prob
    ratio = (log_prob - evidence.old_log_prob).abs().max().item()
    trained = [p for p in field.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    (-log_prob.mean() / 100).backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        save_policy(field, folder)
        back = type(field.policy).from_pretrained(folder)
    after = ours(policy, obs, noise)
    saved = (after - theirs(back, obs, noise)).abs().max().item()
    moved = (after - theirs(make(), obs, noise)).abs().max().item()
    numbers = sum(p.numel() for p in trained), sum(p.numel() for p in field.parameters())
    print(f"{name}: loop {border:.1e}  first log-ratio {ratio:.1e}  loaded back {saved:.1e}  moved by {moved:.1e}")
    print(f"{name}: {numbers[0]} of {numbers[1]} parameters train")
    assert moved > 10 * LIMIT, f"{name}: the update changed nothing"
    return max(border, ratio, saved)


def main() -> None:
    """The command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with ExitStack() as stack:
        for version in ("pi0", "pi05"):
            stack.enter_context(tiny.narrow(import_module(f"lerobot.policies.{version}.modeling_{version}")))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        worst = max(
            check("pi0", lambda: tiny.pi("pi0")),
            check("pi05", lambda: tiny.pi("pi05")),
            check("smolvla", lambda: tiny.smolvla(folder)),
        )
    assert worst < LIMIT, f"{worst} is above {LIMIT}"


if __name__ == "__main__":
    main()
