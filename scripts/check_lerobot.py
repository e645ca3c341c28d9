"""Tiny random pi0, pi0.5, SmolVLA and EO-1 of the real LeRobot behind rlflow's adapter (Python 3.12):

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
from unittest import mock

import torch
from lerobot.configs.policies import PreTrainedConfig
from torch import Tensor

from rlflow.flow.kernels import FlowSDE
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import OneRandom
from rlflow.models.lerobot import tiny
from rlflow.models.lerobot.eo1 import as_list
from rlflow.models.lerobot.export import save_policy
from rlflow.models.lerobot.field import LeRobotField
from rlflow.models.lerobot.opening import lerobot
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.types import Tree, as_bytes

ROWS, STEPS, LIMIT = 4, 4, 1e-4


@torch.no_grad()
def ours(policy: FlowPolicy, obs: Tree, noise: Tensor) -> Tensor:
    """Actions of our chain without noise."""
    return policy.sample(policy.encode(obs), x_0=noise).final[..., :6]


@torch.no_grad()
def theirs(policy: Any, obs: Tree, noise: Tensor) -> Tensor:
    """Actions of LeRobot's loop from the same start."""
    policy.reset()
    with mock.patch.object(policy.model, "sample_noise", return_value=noise):  # EO-1 takes none
        return policy.predict_action_chunk(as_list(obs), noise=noise)


def opened(kind: Any, folder: str) -> Any:
    """By LeRobot alone, as its `make_policy` does."""
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = Path(folder)
    return kind.from_pretrained(folder, config=config)


def prompts(folder: Path) -> Tree:
    """Of ROWS pictures and sentences what the processors of an EO-1 in `folder` make."""
    open_eo1 = lerobot(str(folder))
    seen = {"observation.images.top": torch.rand(ROWS, 3, 56, 56), "observation.state": torch.randn(ROWS, 6)}
    return open_eo1.processors.before(seen | {"task": as_bytes(["push the T", "", "go", "up"], 32)})


def check(name: str, make: Callable[[], Any], batch: Callable[[], Tree] = lambda: tiny.batch(ROWS)) -> float:
    """The largest of the three figures, which are printed."""
    torch.manual_seed(0)
    field, obs = LeRobotField(make(), batch()), batch()
    policy, likelihood = FlowPolicy(field, FlowSDE(0.5), num_steps=STEPS), ChainLikelihood("sum")
    noise = torch.randn(ROWS, *field.event_shape)
    before = ours(policy, obs, noise)
    border = (before - theirs(field.policy, obs, noise)).abs().max().item()
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
        back = opened(type(field.policy), folder)
    after = ours(policy, obs, noise)
    saved = (after - theirs(back, obs, noise)).abs().max().item()
    moved = (after - before).abs().max().item()
    numbers = sum(p.numel() for p in trained), sum(p.numel() for p in field.parameters())
    print(f"{name}: loop {border:.1e}  first log-ratio {ratio:.1e}  loaded back {saved:.1e}  moved by {moved:.1e}")
    print(f"{name}: {numbers[0]} of {numbers[1]} parameters train")
    assert moved > 10 * LIMIT, f"{name}: the update changed nothing"
    return max(border, ratio, saved)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["pi0", "pi05", "smolvla", "eo1"])
    names = parser.parse_args().names
    with ExitStack() as stack:
        for version in ("pi0", "pi05"):
            stack.enter_context(tiny.narrow(import_module(f"lerobot.policies.{version}.modeling_{version}")))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checks = {
            "pi0": lambda: check("pi0", lambda: tiny.pi("pi0")),
            "pi05": lambda: check("pi05", lambda: tiny.pi("pi05")),
            "smolvla": lambda: check("smolvla", lambda: tiny.smolvla(folder)),
            "eo1": lambda: check("eo1", lambda: tiny.eo1(folder / "eo1"), lambda: prompts(folder / "eo1")),
        }
        worst = max(checks[name]() for name in names)
    assert worst < LIMIT, f"{worst} is above {LIMIT}"


if __name__ == "__main__":
    main()
