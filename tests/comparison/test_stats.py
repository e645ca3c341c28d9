"""Several tasks: scipy's trimmed mean and Mann-Whitney's count, areas under profiles, strata and coverage."""

import math

import numpy as np
import pytest

from rlflow.comparison.stats import improvement, improvement_interval, iqm, iqm_interval, profile


def tasks(*shifts: float, seeds: int = 8) -> list[np.ndarray]:
    """Normal scores around the shift of each task."""
    rng = np.random.default_rng(3)
    return [rng.normal(shift, 1.0, seeds) for shift in shifts]


class TestAcrossTasks:
    def test_the_interquartile_mean_is_scipys_trimmed_mean_of_all_scores(self):
        stats = pytest.importorskip("scipy.stats")
        for seeds in (3, 5, 8):
            scores = tasks(0, 2, -1, seeds=seeds)
            assert iqm(scores) == pytest.approx(stats.trim_mean(np.concatenate(scores), 0.25))

    def test_the_outer_quarters_have_no_say(self):
        scores = tasks(0, 5)
        wild = [np.where(s == np.concatenate(scores).max(), 1e9, s) for s in scores]
        assert iqm(wild) == pytest.approx(iqm(scores))
        assert np.mean(np.concatenate(wild)) > 1e6

    def test_improvement_is_mann_whitneys_and_both_ways_make_one(self):
        stats = pytest.importorskip("scipy.stats")
        x, y = tasks(0, 1, seeds=7), tasks(0.5, 0, seeds=5)
        x[0][:3] = y[0][:3]  # equals count half
        each = [stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(x, y, strict=True)]
        assert improvement(x, y) == pytest.approx(np.mean(each))
        assert improvement(x, y) + improvement(y, x) == pytest.approx(1)
        assert improvement(x, x) == 0.5

    def test_the_area_under_a_profile_is_the_mean_score(self):
        """Of scores in [0, 1]: the integral of P(score > t) over t. Tasks count alike, whatever their seeds."""
        scores = [np.random.default_rng(0).random(5), np.random.default_rng(1).random(3)]
        t = (np.arange(20_000) + 0.5) / 20_000
        assert profile(scores, t).mean() == pytest.approx(np.mean([s.mean() for s in scores]), abs=1e-4)

    def test_seeds_are_drawn_inside_their_task(self):
        """Tasks whose seeds agree leave nothing to chance, however far apart they are."""
        assert iqm_interval([np.full(4, 1.0), np.full(4, 1000.0)]) == pytest.approx((500.5, 500.5, 500.5))

    def test_one_seed_each_has_no_interval(self):
        value, low, high = iqm_interval([np.array([0.3]), np.array([0.5])])
        assert value == pytest.approx(0.4)
        assert math.isnan(low)
        assert math.isnan(high)

    def test_intervals_hold_the_truth_as_often_as_they_say(self):
        """A single task of normal scores, whose interquartile mean is 0: 90 % intervals of 20 seeds."""
        rng = np.random.default_rng(5)
        found = [iqm_interval([rng.normal(size=20)], num=400, seed=i, level=0.9) for i in range(200)]
        assert np.mean([low <= 0 <= high for _, low, high in found]) == pytest.approx(0.87, abs=0.07)
        clear = improvement_interval([rng.normal(3, 1, 10)], [rng.normal(0, 1, 10)])
        assert clear.low > 0.5
