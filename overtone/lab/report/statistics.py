"""How sure a mean over edits is, and a difference between two losses on the same edits: a bootstrap of whole units.

A unit is what is independent of the others: a single edit, or a sequence of edits. A resample draws units with
replacement and averages over all of their edits. Over few units the percentiles of the resamples lie too close to the
mean: an interval over 6 excludes 0 in about 13% of cases without a difference. Those of differences are therefore
stretched to what Student's t would give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm, t

RESAMPLES = 9999
"""As SciPy's bootstrap draws."""

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Estimate:
    """A mean over edits with its 95% interval, whose ends are NaN where there is a single unit."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0; what rounding errors leave of equal accuracies is 0."""
        return self.low > _ROUNDING or self.high < -_ROUNDING


def bootstrap_mean(values: pd.Series, units: Any) -> Estimate:
    """The mean of the values that are not NaN, and its 95% percentile interval over resampled units.

    Args:
        values: one per edit.
        units: what each edit belongs to, as `pandas.Series.groupby` takes it.

    Raises:
        ValueError: no values.
    """
    mean, resampled = _resample(values.to_frame(), units)
    return _interval(mean, resampled, stretch=1.0)


def bootstrap_difference(differences: pd.DataFrame, units: Any) -> Estimate:
    """The mean over columns of each column's mean difference, with a stretched interval.

    A resample draws the same units in every column, so that columns of the same edits count as what they are. Both ends
    of the percentile interval are moved away from the mean by the factor sqrt(n / (n - 1)) * t / 1.96, where n is the
    number of units and t the 97.5% quantile of Student's t with n - 1 degrees of freedom.

    Args:
        differences: a row an edit; NaN where one of the two losses does not have it.
        units: what each row belongs to; every unit has a difference in every column.

    Raises:
        ValueError: no differences.
    """
    differences = differences.dropna(how="all")
    mean, resampled = _resample(differences, units)
    count = differences.groupby(units).ngroups
    stretch = math.sqrt(count / (count - 1)) * t.ppf(0.975, count - 1) / norm.ppf(0.975) if count > 1 else math.nan
    return _interval(mean, resampled, stretch=float(stretch))


def _resample(values: pd.DataFrame, units: Any) -> tuple[float, NDArray[np.float64] | None]:
    grouped = values.dropna(how="all").groupby(units)
    sums, counts = grouped.sum().to_numpy(), grouped.count().to_numpy()
    if not len(sums):
        raise ValueError("values are empty: there is nothing to average")
    mean = float((sums.sum(axis=0) / counts.sum(axis=0)).mean())
    if len(sums) == 1:
        return mean, None
    draws = _draws(len(sums))
    return mean, ((draws @ sums) / (draws @ counts)).mean(axis=1)


def _interval(mean: float, resampled: NDArray[np.float64] | None, *, stretch: float) -> Estimate:
    if resampled is None:
        return Estimate(mean, math.nan, math.nan)
    low, high = (mean + stretch * (float(end) - mean) for end in np.percentile(resampled, [2.5, 97.5]))
    return Estimate(mean, low, high)


@lru_cache(maxsize=4)
def _draws(units: int) -> NDArray[np.float64]:
    """How often each resample (rows) holds each unit (columns): a report has thousands of means over as many units."""
    drawn = np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), size=RESAMPLES)
    return drawn.astype(np.float64)
