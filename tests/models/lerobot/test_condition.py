"""A condition taken apart and put together is the same function, of whichever rows."""

from types import SimpleNamespace

import pytest
import torch

from rlflow.models.lerobot.condition import again, axes_of, cells, pooled, take_apart, tensors
from rlflow.types import Cond


def made(num: int):
    """A closure as EO-1's: positions whose rows are the second axis, a cache, a slice, a buffer that it writes into."""
    rng = torch.Generator().manual_seed(num)
    place = torch.randn(3, num, 4, generator=rng)
    keys, shared = torch.randn(num, 2, 5, 4, generator=rng), torch.arange(4.0)
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=keys, values=keys + 1)])
    span, buffer, pair = slice(1, 3), torch.zeros(num, 4), [place[0], {"again": keys.sum(1)}]

    def denoise(x, s):
        buffer[:, span] = x[:, span] * s[:, None]
        cache.layers[0].keys = torch.cat([cache.layers[0].keys, cache.layers[0].keys], 2)
        found = buffer + place.sum(0) + cache.layers[0].values.sum((1, 2)) + shared
        return found + pair[0] + pair[1]["again"].sum(1)

    return denoise


def rebuilt(num: int):
    axes = axes_of(tensors(cells(made(2))), tensors(cells(made(3))))
    fn, parts = made(num), {}
    how = {n: take_apart(v, n, axes, parts) for n, v in cells(fn).items()}
    return fn, Cond(parts), lambda cond, x, s: again(fn, {n: make(cond) for n, make in how.items()})(x, s)


def test_rows_are_found_wherever_they_stand():
    axes = axes_of(tensors(cells(made(2))), tensors(cells(made(3))))
    assert axes["place"] == 1
    assert axes["shared"] is None
    assert {axes[n] for n in axes if n not in ("place", "shared")} == {0}


def test_any_rows_in_any_order_give_what_the_closure_gives_for_them():
    fn, cond, call = rebuilt(6)
    x, s = torch.randn(6, 4), torch.rand(6)
    whole = fn(x, s)
    rows = torch.tensor([4, 0, 4])
    torch.testing.assert_close(call(cond.index(rows), x[rows], s[rows]), whole[rows], rtol=0, atol=0)
    torch.testing.assert_close(call(cond, x, s), whole, rtol=0, atol=0)


def test_what_a_step_writes_into_is_its_own():
    _, cond, call = rebuilt(4)
    before = {n: v.clone() for n, v in cond.data.items()}
    x = torch.randn(4, 4, requires_grad=True)
    call(cond, x, torch.rand(4)).sum().backward()
    call(cond, x, torch.rand(4)).sum().backward()  # no graph of the first call is left behind
    assert all(torch.equal(cond.data[n], before[n]) for n in before)


def test_what_cannot_be_looked_into_is_refused():
    held = object()
    with pytest.raises(ValueError, match=r"under a object \(held\)"):
        tensors(cells(lambda x, s: held))


def test_pooled_means_valid_tokens_of_both_layouts():
    values = torch.randn(2, 3, 5, 4)  # (N, heads, L, d)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    by_heads = pooled({"c.0.values": values, "prefix_pad_masks": mask})
    by_tokens = pooled({"c.0.values": values.transpose(1, 2), "prefix_pad_masks": mask})
    torch.testing.assert_close(by_heads, by_tokens)
    mean = values[0, :, :2].mean(1).flatten()
    torch.testing.assert_close(by_heads[0], (mean - mean.mean()) / mean.std(correction=0), atol=1e-4, rtol=0)


def test_pooled_tells_small_differences_and_the_state():
    """However small the values are, and though the state is one of many tokens."""
    values, state = torch.randn(2, 3, 50, 4) * 1e-2, torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    found = pooled({"c.0.values": values}, state)
    assert torch.equal(found[:, 12:], state)
    torch.testing.assert_close(found[:, :12].std(1, correction=0), torch.ones(2), atol=0.05, rtol=0)
