"""The learning rate of the optimisers by hand, and what they step."""

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
        p.grad, before = torch.ones(2), p.detach().clone()
        optimizer.step() if kind is Optimizer else optimizer.advance()
        assert (before - p).tolist() == pytest.approx([seen[-1]] * 2, rel=1e-4)  # Adam's step for a steady gradient
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_torchs_adamw(dtype):
    """Its state too, in which a run of an older build was saved; parameters of two dtypes go in two groups."""
    torch.manual_seed(0)
    mine = [
        torch.nn.Parameter(torch.randn(s, dtype=d)) for s, d in (((3, 2), dtype), ((4,), dtype), ((2,), torch.float32))
    ]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    config = AdamW(lr=0.01, weight_decay=0.1, max_grad_norm=0.0)
    optimizer, other = Optimizer(mine, config), torch.optim.AdamW(theirs, lr=0.01, betas=config.betas, weight_decay=0.1)
    for _ in range(3):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step(), other.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q)
    state = {f"{i}/{k}": v for i, s in other.state_dict()["state"].items() for k, v in s.items()}
    found = optimizer.state_dict()
    torch.testing.assert_close(found["moments"], state)
    again = Optimizer(mine, config)
    again.load_state_dict(found | {"moments": state})
    torch.testing.assert_close(again.state_dict()["moments"], state)
