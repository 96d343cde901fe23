"""Bootstrap of units: against SciPy's, against what can be counted by hand, and where intervals must hold 0."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_rel

from overtone.lab.report.statistics import bootstrap_difference, bootstrap_mean


def scipy_interval(values, units, seed):
    """SciPy's bootstrap of the ratio of sums to counts, with the units as its observations."""
    sums, counts = {}, {}
    for value, unit in zip(values, units, strict=True):
        sums[unit] = sums.get(unit, 0.0) + value
        counts[unit] = counts.get(unit, 0) + 1
    return bootstrap(
        (np.array(list(sums.values())), np.array(list(counts.values()))),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval


def column(values):
    return np.asarray(values, dtype=float)[:, None]


class TestBootstrapMean:
    @pytest.mark.parametrize("edits_per_unit", [1, 7])
    def test_is_scipys_interval(self, edits_per_unit):
        """As near to SciPy's as SciPy's with another seed is, twice over."""
        values = np.random.default_rng(3).random(105)
        units = [place // edits_per_unit for place in range(105)]
        ours = bootstrap_mean(values, units)
        first, second = scipy_interval(values, units, 1), scipy_interval(values, units, 2)
        tolerance = 2 * max(abs(first.low - second.low), abs(first.high - second.high), 0.002)
        assert ours.mean == pytest.approx(values.mean())
        assert ours.low == pytest.approx(first.low, abs=tolerance)
        assert ours.high == pytest.approx(first.high, abs=tolerance)

    def test_three_units_span_their_range(self):
        """All draws of one unit alone have 1 in 27, more than 2.5%: the ends are the lowest and highest unit."""
        estimate = bootstrap_mean([0.0, 0.2, 0.4, 0.6, 1.0, 1.0], ["a", "a", "b", "b", "c", "c"])
        assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((3.2 / 6, 0.1, 1.0))

    def test_a_unit_counts_by_its_edits_and_nan_by_nothing(self):
        """Three edits of 1 and one of 0: the mean is over edits, not over units."""
        assert bootstrap_mean([1.0, 1.0, 1.0, math.nan, 0.0], list("aaabb")).mean == 0.75

    def test_one_unit_has_no_interval(self):
        estimate = bootstrap_mean([0.2, 0.4], ["a", "a"])
        assert estimate.mean == pytest.approx(0.3)
        assert math.isnan(estimate.low)
        assert math.isnan(estimate.high)
        assert not estimate.excludes_zero

    def test_is_the_same_every_time(self):
        values = np.random.default_rng(0).random(20)
        assert bootstrap_mean(values, range(20)) == bootstrap_mean(values, range(20))

    def test_refuses_nothing(self):
        for values in ([], [math.nan]):
            with pytest.raises(ValueError, match="values are empty"):
                bootstrap_mean(values, [0] * len(values))


class TestBootstrapDifference:
    @pytest.mark.parametrize("edits_per_unit", [1, 4])
    def test_is_the_bootstrap_mean_stretched_about_the_mean(self, edits_per_unit):
        """By sqrt(6 / 5) * 2.5706 / 1.9600, the quantiles with 5 degrees of freedom and of the normal distribution."""
        gains = np.random.default_rng(2).random(6 * edits_per_unit)
        units = [edit // edits_per_unit for edit in range(len(gains))]
        plain, found = bootstrap_mean(gains, units), bootstrap_difference(column(gains), units)
        assert found.mean == pytest.approx(plain.mean)
        for end, plain_end in ((found.low, plain.low), (found.high, plain.high)):
            assert (end - plain.mean) / (plain_end - plain.mean) == pytest.approx(1.43671, abs=1e-4)

    def test_is_as_wide_as_the_t_interval_of_scipy(self):
        """Of many normal differences, the mean width over 12 edits: within 5%."""
        rng = np.random.default_rng(0)
        ours, theirs = [], []
        for _ in range(100):
            values, baseline = rng.normal(size=(2, 12))
            found = bootstrap_difference(column(values - baseline), range(12))
            interval = ttest_rel(values, baseline).confidence_interval()
            ours.append(found.high - found.low)
            theirs.append(interval.high - interval.low)
        assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.05)

    def test_few_units_are_rarely_called_a_difference(self):
        """Of 600 comparisons over 6 units without a difference 5% exclude 0, or 30; without the stretch 13%, or 78."""
        rng = np.random.default_rng(0)
        found = sum(bootstrap_difference(rng.normal(size=(6, 1)), range(6)).excludes_zero for _ in range(600))
        assert found < 51, "30 and four standard errors"

    def test_rounding_is_no_difference(self):
        assert not bootstrap_difference(np.full((8, 1), 1e-16), range(8)).excludes_zero

    def test_columns_weigh_alike_and_the_same_edits_again_say_nothing_more(self):
        """As wide for two columns of the same edits as for one."""
        gains = np.random.default_rng(4).random((12, 1))
        once, twice = (bootstrap_difference(np.tile(gains, times), range(12)) for times in (1, 2))
        assert (twice.mean, twice.low, twice.high) == pytest.approx((once.mean, once.low, once.high))
        uneven = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, math.nan], [1.0, math.nan]])
        assert bootstrap_difference(uneven, [0, 1, 0, 1]).mean == 0.5
