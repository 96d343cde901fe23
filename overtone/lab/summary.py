"""From records of single edits to a mean and a 95% interval per method, loss and measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from overtone.lab.records import EditRecord


@dataclass(frozen=True)
class Estimate:
    """A mean over edits with its bootstrap interval, which a single edit does not have.

    Attributes:
        mean: the mean.
        low: lower end of the 95% interval, or None.
        high: upper end of the 95% interval, or None.
        count: how many edits.
    """

    mean: float
    low: float | None
    high: float | None
    count: int


MEASURES: Mapping[str, Callable[[EditRecord], float | None]] = {
    "rel": lambda record: record.scores.accuracy.get("rel"),
    "gen": lambda record: record.scores.accuracy.get("gen"),
    "por": lambda record: record.scores.accuracy.get("por"),
    "loc": lambda record: record.scores.accuracy.get("loc"),
    "average": lambda record: fmean(record.scores.accuracy.values()),
    "exact_match_rel": lambda record: record.scores.exact_match.get("rel"),
    "exact_match_gen": lambda record: record.scores.exact_match.get("gen"),
    "exact_match_por": lambda record: record.scores.exact_match.get("por"),
    "exact_match_loc": lambda record: record.scores.exact_match.get("loc"),
    "exact_match_average": lambda record: fmean(record.scores.exact_match.values()),
    "p_new": lambda record: record.scores.p_new,
    "p_old": lambda record: record.scores.p_old,
    "kl": lambda record: record.scores.kl,
    "steps": lambda record: float(record.steps),
}
"""What is summarised: a name, and how to read it from a record; None where the edit has no such probe."""


@dataclass(frozen=True)
class SummaryRow:
    """All measures of one method with one loss."""

    method: str
    loss: str
    measures: dict[str, Estimate]


def summarise(records: Iterable[EditRecord], *, seed: int = 0) -> list[SummaryRow]:
    """One row per method and loss, in the order in which they first appear.

    Args:
        records: of single edits.
        seed: of the bootstrap.
    """
    groups: dict[tuple[str, str], list[EditRecord]] = {}
    for record in records:
        groups.setdefault((record.method, record.loss), []).append(record)
    rows = []
    for (method, loss), group in groups.items():
        read = {
            name: [value for value in map(measure, group) if value is not None] for name, measure in MEASURES.items()
        }
        measures = {name: estimate(values, seed=seed) for name, values in read.items() if values}
        rows.append(SummaryRow(method, loss, measures))
    return rows


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The mean and its 95% percentile-bootstrap interval.

    The percentile interval is defined for constant values too, which accuracies of easy edits often are.

    Raises:
        ImportError: SciPy is not there.
        ValueError: no values.
    """
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise ImportError('the lab needs SciPy: pip install "overtone[lab]"') from error

    if not values:
        raise ValueError("values is empty: there is nothing to average")
    if len(values) == 1:
        return Estimate(values[0], None, None, 1)
    interval = bootstrap(
        (np.asarray(values),), np.mean, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Estimate(fmean(values), float(interval.low), float(interval.high), len(values))
