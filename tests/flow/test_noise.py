"""Noise is a pure function of (key, row): no batching, order, worker or global generator enters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlflow.flow.noise import Key, derive_seed, generator, noise

EVENTS = [(), (1,), (3,), (4, 7), (3, 16, 16), (1024,), (3, 32, 32), (4097,)]
KEY = Key(7, "sample/step", iteration=3, outer=2, k=5)


@pytest.mark.parametrize("shape", EVENTS)
def test_a_row_is_the_same_in_every_batch(shape):
    rows = torch.arange(40)
    whole = noise(KEY, rows, shape)
    assert whole.shape == (40, *shape)
    assert torch.equal(noise(KEY, rows[13:29], shape), whole[13:29])
    assert torch.equal(noise(KEY, rows[17:18], shape), whole[17:18])
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise(KEY, rows[shuffled], shape), whole[shuffled])


@given(rows=st.lists(st.integers(0, 20_000), min_size=1, max_size=30), dim=st.integers(1, 1500))
def test_any_rows_in_any_order_with_repeats(rows, dim):
    """Across the borders of blocks: each row equals the row drawn alone."""
    together = noise(KEY, torch.tensor(rows), (dim,))
    alone = torch.cat([noise(KEY, torch.tensor([row]), (dim,)) for row in rows])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("shape", [(2,), (4, 8, 8), (3, 32, 32)])
def test_repeated_rows_repeat(shape):
    drawn = noise(KEY, torch.tensor([4, 4, 9, 4]), shape)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("shape", [(2,), (3, 32, 32)])
@pytest.mark.parametrize(
    "other",
    [
        KEY._replace(seed=8),
        KEY._replace(purpose="sample/x_0"),
        KEY._replace(iteration=4),
        KEY._replace(outer=3),
        KEY._replace(k=6),
        KEY._replace(outer=5, k=2),
    ],
)
def test_every_field_of_the_key_takes_part(shape, other):
    rows = torch.arange(64)
    a, b = noise(KEY, rows, shape), noise(other, rows, shape)
    assert not torch.isclose(a, b, atol=1e-6).flatten(1).all(1).any()
    assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 5 / a.numel() ** 0.5


@pytest.mark.parametrize("shape", [(), (3,), (1024,), (3, 32, 32)])
def test_rows_differ(shape):
    drawn = noise(KEY, torch.arange(100), shape).reshape(100, -1)
    assert len(torch.unique(drawn, dim=0)) == 100


def test_neighbouring_keys_together_are_one_standard_normal_sample():
    """Moments and a Kolmogorov-Smirnov test over rows, steps and iterations at once."""
    drawn = [
        noise(KEY._replace(k=k, iteration=i), torch.arange(500), (3,), torch.float64)
        for k in range(5)
        for i in range(5)
    ]
    x = torch.stack(drawn).flatten()
    n = len(x)
    assert abs(float(x.mean())) < 4 / n**0.5
    assert abs(float(x.square().mean()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float(x.pow(4).mean()) - 3) < 4 * (96 / n) ** 0.5
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = noise(KEY, torch.arange(5), (3,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(noise(KEY, torch.arange(5), (3,)), a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_the_one_asked_for(dtype):
    assert noise(KEY, torch.arange(3), (2,), dtype).dtype == dtype


def test_no_rows_is_an_empty_draw():
    for shape in [(2,), (3, 32, 32)]:
        assert noise(KEY, torch.arange(0), shape).shape == (0, *shape)


def test_seeds_depend_on_the_order_and_type_of_the_parts():
    parts = [(1, 2), (2, 1), (12,), ("1", 2), (1, "2"), ("1, 2",)]
    assert len({derive_seed(*p) for p in parts}) == len(parts)
    assert all(0 <= derive_seed(*p) < 2**63 for p in parts)


def test_equal_parts_give_equal_generators():
    a, b = (torch.randn(4, generator=generator("window", 0, 3)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.randn(4, generator=generator("window", 0, 4)))
