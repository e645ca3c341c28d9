"""The cluster bootstrap: closed form, coverage, pairs and missing scores."""

import math

import numpy as np
import pytest

from rlflow.report.stats import bootstrap_mean, paired_bootstrap


def test_independent_rows_give_the_closed_form():
    """mean +- 1.96 sd / sqrt(n) for independent rows."""
    values = np.random.default_rng(0).normal(2.0, 3.0, 800)
    mean, low, high = bootstrap_mean(values, num=8000)
    error = 1.96 * values.std() / math.sqrt(800)
    assert mean == pytest.approx(values.mean())
    assert [mean - low, high - mean] == pytest.approx([error, error], rel=0.06)


def test_clusters_of_equal_rows_count_once():
    """Ten copies of every row carry no more information than one: the same interval."""
    values = np.random.default_rng(1).normal(size=60)
    once = bootstrap_mean(values, np.arange(60))
    copied = bootstrap_mean(np.tile(values, 10), np.tile(np.arange(60), 10))
    assert copied == pytest.approx(once)
    rows_alone = bootstrap_mean(np.tile(values, 10))
    assert rows_alone.high - rows_alone.low < 0.5 * (once.high - once.low)


def test_captions_of_different_size_do_not_widen_the_interval():
    """Where every score is 1, so is every replicate, however many rows a drawn caption has."""
    cluster = np.repeat(np.arange(10), np.arange(1, 11))
    assert bootstrap_mean(np.ones(55), cluster) == (1.0, 1.0, 1.0)


def _covered(rng: np.random.Generator, clustered: bool) -> bool:
    """One experiment: 80 captions of random accuracy before and after (+.1 on average), 4 images each."""
    cluster = np.repeat(np.arange(80), 4)
    before = np.repeat(rng.uniform(0.2, 0.6, 80), 4)
    after = before + np.repeat(rng.uniform(-0.2, 0.4, 80), 4)
    scores = [(rng.random(320) < p).astype(float) for p in (before, after)]
    _, low, high = paired_bootstrap(*scores, cluster if clustered else np.arange(320), num=400)
    return low <= 0.1 <= high


def test_coverage_is_95_percent():
    """The interval holds the true difference in about 95 % of 400 experiments."""
    rng = np.random.default_rng(2)
    covered = np.mean([_covered(rng, clustered=True) for _ in range(400)])
    assert 0.92 <= covered <= 0.975


def test_ignoring_clusters_covers_too_rarely():
    """With strongly clustered rows the row bootstrap is overconfident, which is why captions are resampled."""
    rng = np.random.default_rng(3)
    cluster = np.repeat(np.arange(30), 20)
    hits = {True: 0, False: 0}
    for _ in range(100):
        values = np.repeat(rng.normal(size=30), 20) + 0.3 * rng.normal(size=600)
        for clustered in hits:
            _, low, high = bootstrap_mean(values, cluster if clustered else None, num=200)
            hits[clustered] += low <= 0 <= high
    assert hits[True] >= 88
    assert hits[False] <= 50


def test_a_pair_with_a_missing_score_is_left_out():
    """nan on either side removes the pair, and nothing else."""
    before, after = np.array([0, 1, math.nan, 0, 1.0]), np.array([1, 1, 1, math.nan, 0.0])
    assert paired_bootstrap(before, after, np.arange(5)) == paired_bootstrap([0, 1, 1], [1, 1, 0], [0, 1, 2])


def test_too_few_clusters_have_no_interval():
    """One caption, or none with a score, gives no bounds."""
    value, low, high = bootstrap_mean([1.0, 0.0, 1.0], [7, 7, 7])
    assert value == pytest.approx(2 / 3)
    assert math.isnan(low)
    assert math.isnan(high)
    assert all(math.isnan(v) for v in bootstrap_mean([math.nan, math.nan]))


def test_the_result_is_a_function_of_the_seed():
    """Same seed, same interval; another seed, another; chunks do not matter."""
    values = np.random.default_rng(4).random(50)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


@pytest.mark.parametrize(
    ("before", "after", "cluster", "words"),
    [
        ([1, 2], [1], [0, 1], "same rows"),
        ([1, 2], [1, 2], [0], "one id per row"),
        ([[1]], [[1]], [0], "one number per row"),
    ],
)
def test_rows_that_do_not_match_are_refused(before, after, cluster, words):
    """A comparison of different samples is an error, not a number."""
    with pytest.raises(ValueError, match=words):
        paired_bootstrap(before, after, cluster)
