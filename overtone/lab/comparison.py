"""How sure a mean over edits is, and a difference between two losses on the same edits: a bootstrap of whole units.

A unit is what is independent of the others: a single edit, or a sequence of edits. A resample draws units with
replacement and averages over all of their edits. Over few units the percentiles of the resamples lie too close to the
mean: an interval over 6 excludes 0 in about 13% of cases without a difference. Those of differences are therefore
stretched to what Student's t would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from overtone.lab.summary import Estimate

RESAMPLES = 9999
"""As SciPy's bootstrap draws."""

_ROUNDING = 1e-9

Key = TypeVar("Key", bound=Hashable)


def bootstrap_mean(values: Sequence[float], units: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """The mean and its 95% percentile interval over resampled units.

    Args:
        values: one per edit.
        units: what each edit belongs to, one per edit; a single unit has no interval.
        seed: of the resamples; the same for two calls means the same resamples where the number of units is the same.

    Raises:
        ValueError: no values, or another number of units.
    """
    if not values:
        raise ValueError("values is empty: there is nothing to average")
    if len(values) != len(units):
        raise ValueError(f"values and units must be of one length, got {len(values)} and {len(units)}")
    places = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    place_of_each = [places[unit] for unit in units]
    sums = np.bincount(place_of_each, weights=values)
    counts = np.bincount(place_of_each)
    mean = float(sums.sum() / counts.sum())
    if len(places) == 1:
        return Estimate(mean, None, None, len(values))
    draws = _draws(len(places), seed)
    low, high = np.percentile((draws @ sums) / (draws @ counts), [2.5, 97.5])
    return Estimate(mean, float(low), float(high), len(values))


def paired_difference(
    values: Mapping[Key, float],
    baseline: Mapping[Key, float],
    units: Mapping[Key, Hashable],
    *,
    seed: int = 0,
) -> Estimate | None:
    """The mean of values - baseline over the edits that both have, with a stretched interval.

    Both ends of the interval of `bootstrap_mean` are moved away from the mean by the factor
    sqrt(n / (n - 1)) * t / 1.96, where n is the number of units resampled and t the 97.5% quantile of Student's t with
    n - 1 degrees of freedom.

    Args:
        values: by edit.
        baseline: by edit.
        units: what each edit belongs to.
        seed: of the resamples.

    Returns:
        None where no edit is in both.

    Raises:
        ImportError: SciPy is not there.
    """
    return mean_paired_difference([(values, baseline)], units.__getitem__, seed=seed)


def mean_paired_difference(
    cells: Sequence[tuple[Mapping[Key, float], Mapping[Key, float]]],
    unit: Callable[[Key], Hashable],
    *,
    seed: int = 0,
) -> Estimate | None:
    """The mean over cells of the mean difference in each, with an interval stretched as in `paired_difference`.

    A resample draws the same units in every cell, so that cells on the same edits count as what they are.

    Args:
        cells: values and baseline of each, by edit.
        unit: what an edit belongs to, in every cell.
        seed: of the resamples.

    Returns:
        None where no unit has an edit with both values in every cell.

    Raises:
        ImportError: SciPy is not there.
    """
    by_unit: list[dict[Hashable, list[float]]] = []
    for values, baseline in cells:
        found: dict[Hashable, list[float]] = {}
        for key in values:
            if key in baseline:
                found.setdefault(unit(key), []).append(values[key] - baseline[key])
        by_unit.append(found)
    units = [name for name in by_unit[0] if all(name in found for found in by_unit)]
    if not units:
        return None
    sums, counts = (
        np.array([[measure(found[name]) for name in units] for found in by_unit], dtype=np.float64)
        for measure in (sum, len)
    )
    mean = float((sums.sum(axis=1) / counts.sum(axis=1)).mean())
    edits = int(counts.sum())
    if len(units) == 1:
        return Estimate(mean, None, None, edits)
    draws = _draws(len(units), seed)
    resampled = ((draws @ sums.T) / (draws @ counts.T)).mean(axis=1)
    stretch = _stretch(len(units))
    low, high = (mean + stretch * (float(end) - mean) for end in np.percentile(resampled, [2.5, 97.5]))
    return Estimate(mean, low, high, edits)


def excludes_zero(difference: Estimate) -> bool:
    """Whether the whole interval lies on one side of 0; a difference without an interval never does.

    What rounding errors leave of equal accuracies is 0.
    """
    if difference.low is None or difference.high is None:
        return False
    return difference.low > _ROUNDING or difference.high < -_ROUNDING


@cache
def _stretch(units: int) -> float:
    """From a percentile interval, which is a normal one with n for n - 1, to one of Student's t."""
    try:
        from scipy.stats import norm, t
    except ImportError as error:
        raise ImportError('the lab needs SciPy: pip install "overtone[lab]"') from error
    return math.sqrt(units / (units - 1)) * float(t.ppf(0.975, units - 1) / norm.ppf(0.975))


@lru_cache(maxsize=2)
def _draws(units: int, seed: int) -> NDArray[np.float64]:
    """How often each resample (rows) holds each unit (columns).

    A report has thousands of means over the same number of units; with the counts kept, each is one product.
    """
    chosen = np.random.default_rng(seed).integers(0, units, (RESAMPLES, units))
    chosen += units * np.arange(RESAMPLES)[:, None]
    return np.bincount(chosen.ravel(), minlength=RESAMPLES * units).reshape(RESAMPLES, units).astype(np.float64)
