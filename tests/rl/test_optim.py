"""The learning rate of the optimisers by hand, and what they step."""

import subprocess
import sys

import pytest
import torch

from rlflow.rl.optim import AdamW, Deferred, Optimizer


@pytest.mark.parametrize("kind", [Optimizer, Deferred])
def test_the_rate_warms_up_by_steps_and_decays_by_progress(kind):
    """The first of four steps has a quarter of it; half a cosine ends at `final`."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer, seen = kind([p], AdamW(lr=0.4, warmup=4, cosine=True, final=0.1)), []
    for _ in range(5):
        seen.append(optimizer.learning_rate())
        p.grad = torch.ones(2)
        optimizer.step() if kind is Optimizer else optimizer.advance()
        assert optimizer.adam.param_groups[0]["lr"] == seen[-1]
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    for progress, share in ((0.0, 1.0), (0.5, 0.55), (1.0, 0.1)):
        optimizer.progress = progress
        assert optimizer.learning_rate() == pytest.approx(0.4 * share)


def test_a_parameter_that_nothing_reached_is_stepped_as_among_many_processes():
    """There its gradient is a sum of zeros, and weight decay takes its share of it."""
    used, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizer([used, idle], AdamW(lr=0.1, weight_decay=0.5))
    used.grad = torch.ones(2)
    optimizer.step()
    assert idle.tolist() == pytest.approx([1 - 0.1 * 0.5] * 2)


def test_eager_adamw_is_pytorchs_and_loads_nothing_for_compiling():
    """The same numbers and the same state, without the import that takes a CPU second of every start."""
    code = """
import sys, torch
from rlflow.rl.optim import EagerAdamW
found = []
for kind in (EagerAdamW, torch.optim.AdamW):
    p = torch.nn.Parameter(torch.arange(5.0))
    adam = kind([p], lr=0.1, weight_decay=0.01)
    for k in range(3):
        p.grad = torch.sin(p.detach() + k)
        adam.step()
        if k == 1:
            adam.load_state_dict(adam.state_dict())
    found.append((p.detach(), adam.state_dict()["state"][0]["exp_avg"], adam.state_dict()["param_groups"]))
    assert ("torch._dynamo" in sys.modules) == (kind is torch.optim.AdamW)
assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1]) and found[0][2] == found[1][2]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
