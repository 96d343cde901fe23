"""Bootstrap of units: against SciPy's, against what can be counted by hand, and where intervals must hold 0."""

from __future__ import annotations

import numpy as np
import pytest
from overtone.lab.comparison import bootstrap_mean, excludes_zero, paired_difference
from overtone.lab.summary import Estimate
from scipy.stats import bootstrap, ttest_rel

from overtone.lab import comparison


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


class TestBootstrapMean:
    @pytest.mark.parametrize("edits_per_unit", [1, 7])
    def test_is_scipys_interval(self, edits_per_unit):
        """As near to SciPy's as SciPy's with another seed is, twice over."""
        values = np.random.default_rng(3).random(105)
        units = [place // edits_per_unit for place in range(105)]
        ours = bootstrap_mean(values.tolist(), units)
        first, second = scipy_interval(values, units, 1), scipy_interval(values, units, 2)
        tolerance = 2 * max(abs(first.low - second.low), abs(first.high - second.high), 0.002)
        assert ours.mean == pytest.approx(values.mean())
        assert ours.low == pytest.approx(first.low, abs=tolerance)
        assert ours.high == pytest.approx(first.high, abs=tolerance)
        assert ours.count == 105

    def test_three_units_span_their_range(self):
        """All draws of one unit alone have 1 in 27, more than 2.5%: the ends are the lowest and highest unit."""
        estimate = bootstrap_mean([0.0, 0.2, 0.4, 0.6, 1.0, 1.0], ["a", "a", "b", "b", "c", "c"])
        assert estimate == Estimate(pytest.approx(3.2 / 6), pytest.approx(0.1), pytest.approx(1.0), 6)

    def test_a_unit_counts_by_its_edits(self):
        """Three edits of 1 and one of 0: the mean is over edits, not over units."""
        assert bootstrap_mean([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]).mean == 0.75

    def test_edits_of_one_unit_say_less_than_as_many_units(self):
        values = [0.0, 0.1, 0.0, 0.1, 0.9, 1.0, 0.9, 1.0] * 5
        alone = bootstrap_mean(values, list(range(40)))
        clustered = bootstrap_mean(values, [place // 4 for place in range(40)])
        assert clustered.mean == pytest.approx(alone.mean)
        assert clustered.high - clustered.low > 1.5 * (alone.high - alone.low)

    def test_one_unit_has_no_interval(self):
        assert bootstrap_mean([0.2, 0.4], ["a", "a"]) == Estimate(pytest.approx(0.3), None, None, 2)

    def test_same_seed_same_interval(self):
        values = np.random.default_rng(0).random(20).tolist()
        first = bootstrap_mean(values, range(20), seed=5)
        comparison._draws.cache_clear()
        assert bootstrap_mean(values, range(20), seed=5) == first
        assert bootstrap_mean(values, range(20), seed=6) != first

    def test_refuses_nothing_and_units_of_another_number(self):
        with pytest.raises(ValueError, match="values is empty"):
            bootstrap_mean([], [])
        with pytest.raises(ValueError, match="got 2 and 1"):
            bootstrap_mean([1.0, 2.0], ["a"])


class TestPairedDifference:
    def test_pairs_the_same_edits_only(self):
        """Edits 1 and 2 are in both: +0.5 and +0.1."""
        values, baseline = {1: 1.0, 2: 0.3, 3: 1.0}, {2: 0.2, 1: 0.5, 4: 0.0}
        difference = paired_difference(values, baseline, {edit: edit for edit in range(5)})
        assert difference.mean == pytest.approx(0.3)
        assert difference.count == 2

    @pytest.mark.parametrize("edits_per_unit", [1, 4])
    def test_is_the_bootstrap_mean_stretched_about_the_mean(self, edits_per_unit):
        """By sqrt(6 / 5) * 2.5706 / 1.9600, the quantiles with 5 degrees of freedom and of the normal distribution."""
        gains = np.random.default_rng(2).random(6 * edits_per_unit).tolist()
        units = {edit: edit // edits_per_unit for edit in range(len(gains))}
        plain = bootstrap_mean(gains, list(units.values()))
        found = paired_difference(dict(enumerate(gains)), dict.fromkeys(units, 0.0), units)
        assert (found.mean, found.count) == (plain.mean, plain.count)
        for end, plain_end in ((found.low, plain.low), (found.high, plain.high)):
            assert (end - plain.mean) / (plain_end - plain.mean) == pytest.approx(1.43671, abs=1e-4)

    def test_is_as_wide_as_the_t_interval_of_scipy(self):
        """Of many normal differences, the mean width over 12 edits: within 5%."""
        rng = np.random.default_rng(0)
        ours, theirs = [], []
        for _ in range(100):
            values, baseline = rng.normal(size=(2, 12)).tolist()
            found = paired_difference(*(dict(enumerate(each)) for each in (values, baseline, range(12))))
            interval = ttest_rel(values, baseline).confidence_interval()
            ours.append(found.high - found.low)
            theirs.append(interval.high - interval.low)
        assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.05)

    def test_one_unit_has_no_interval(self):
        assert paired_difference({1: 0.5}, {1: 0.25}, {1: 1}) == Estimate(0.25, None, None, 1)

    def test_few_units_are_rarely_called_a_difference(self):
        """Of 600 comparisons over 6 units without a difference 5% exclude 0, or 30; without the stretch 13%, or 78."""
        rng = np.random.default_rng(0)
        units = {unit: unit for unit in range(6)}
        found = 0
        for _ in range(600):
            values, baseline = (dict(enumerate(rng.normal(size=6).tolist())) for _ in range(2))
            found += excludes_zero(paired_difference(values, baseline, units))
        assert found < 51, "30 and four standard errors"

    def test_a_small_steady_difference_is_found_among_edits_that_vary_a_lot(self):
        rng = np.random.default_rng(1)
        baseline = {edit: float(value) for edit, value in enumerate(rng.random(50))}
        values = {edit: value + 0.02 + 0.01 * float(rng.random()) for edit, value in baseline.items()}
        assert excludes_zero(paired_difference(values, baseline, {edit: edit for edit in baseline}))

    def test_no_edit_in_common(self):
        assert paired_difference({1: 1.0}, {2: 1.0}, {1: 1, 2: 2}) is None

    def test_a_coin_is_rarely_called_a_difference(self):
        """Of 300 comparisons without a difference about 5% exclude 0; 10% would be four standard errors more."""
        rng = np.random.default_rng(0)
        edits = range(40)
        units = {edit: edit for edit in edits}
        found = 0
        for _ in range(300):
            values, baseline = (dict(enumerate(rng.random(40).tolist())) for _ in range(2))
            found += excludes_zero(paired_difference(values, baseline, units))
        assert found < 30


class TestExcludesZero:
    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [
            (0.1, 0.2, True),
            (-0.2, -0.1, True),
            (-0.1, 0.2, False),
            (0.0, 0.2, False),
            (-0.2, 0.0, False),
            (1e-17, 0.2, False),
            (None, None, False),
        ],
    )
    def test_whole_interval_on_one_side(self, low, high, expected):
        assert excludes_zero(Estimate(0.1, low, high, 3)) is expected
