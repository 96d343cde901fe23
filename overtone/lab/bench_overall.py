"""One setting for everything: each loss averaged over all data and lengths of a method, beside the best early stop."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias

from overtone.lab.bench_tables import ENOUGH_UNITS, average, is_early_stopping
from overtone.lab.comparison import excludes_zero, mean_paired_difference
from overtone.lab.outcomes import EditOutcome
from overtone.lab.summary import Estimate

Cell: TypeAlias = tuple[str, int]
"""Data and T."""

EditKey: TypeAlias = tuple[int, int]
"""Seed and index of an edit."""

ONE_THRESHOLD, EVERY_THRESHOLD = "best single threshold", "best threshold of each column"
"""What a row is compared to."""


@dataclass(frozen=True)
class OverallRow:
    """One loss.

    Attributes:
        loss: its spec.
        average: mean over the cells of the mean average in each.
        differences: by what it is compared to; not there for the rival itself.
    """

    loss: str
    average: float
    differences: dict[str, Estimate]


@dataclass(frozen=True)
class Overall:
    """The losses of one method that were run in all of its cells.

    Attributes:
        method: name of the editing method.
        scope: "single edits", "edits in a row", or both.
        cells: data and T of each, with equal weight.
        rows: one per loss.
        one_threshold: the early stop that is best on the average of the cells.
        thresholds: the early stop that is best in each cell.
        units: how many groups of edits count and were resampled: those that every loss has in every cell.
    """

    method: str
    scope: str
    cells: tuple[Cell, ...]
    rows: tuple[OverallRow, ...]
    one_threshold: str
    thresholds: tuple[str, ...]
    units: int

    def is_clear(self, difference: Estimate) -> bool:
        """Whether a difference may be called one: the only ones that tables set in bold."""
        return self.units >= ENOUGH_UNITS and excludes_zero(difference)


def overall(outcomes: Iterable[EditOutcome], *, seed: int = 0) -> list[Overall]:
    """For each method: over single edits, over edits in a row, and over both; where there are several cells.

    Cells of fewer sequences than `ENOUGH_UNITS` are left out, and so are losses that some cell does not have.

    Args:
        outcomes: of whole sequences.
        seed: of the resamples.
    """
    by_method: dict[str, list[EditOutcome]] = {}
    for outcome in outcomes:
        by_method.setdefault(outcome.method, []).append(outcome)
    return [found for method, own in by_method.items() for found in _of_method(method, _of_enough_sequences(own), seed)]


def _of_enough_sequences(outcomes: Sequence[EditOutcome]) -> list[EditOutcome]:
    sequences: dict[Cell, set[Hashable]] = {}
    for outcome in outcomes:
        sequences.setdefault((outcome.data, outcome.length), set()).add((outcome.seed, outcome.sequence))
    return [outcome for outcome in outcomes if len(sequences[outcome.data, outcome.length]) >= ENOUGH_UNITS]


def _of_method(method: str, outcomes: Sequence[EditOutcome], seed: int) -> Iterator[Overall]:
    scopes = {
        "single edits": [outcome for outcome in outcomes if outcome.length == 1],
        "edits in a row": [outcome for outcome in outcomes if outcome.length > 1],
        "single edits and edits in a row": outcomes,
    }
    seen: list[set[Cell]] = []
    for scope, chosen in scopes.items():
        values = _averages(chosen)
        cells = {cell for by_cell in values.values() for cell in by_cell}
        complete = {loss: by_cell for loss, by_cell in values.items() if by_cell.keys() == cells}
        if len(cells) > 1 and cells not in seen and any(map(is_early_stopping, complete)):
            seen.append(cells)
            found = _overall(method, scope, complete, seed)
            if found is not None:
                yield found


def _averages(outcomes: Iterable[EditOutcome]) -> dict[str, dict[Cell, dict[EditKey, float]]]:
    """By loss, cell and edit; failed edits are left out."""
    values: dict[str, dict[Cell, dict[EditKey, float]]] = {}
    for outcome in outcomes:
        value = average(outcome)
        if value is not None:
            cell = values.setdefault(outcome.loss, {}).setdefault((outcome.data, outcome.length), {})
            cell[outcome.seed, outcome.index] = value
    return values


def _overall(
    method: str, scope: str, scored: Mapping[str, Mapping[Cell, Mapping[EditKey, float]]], seed: int
) -> Overall | None:
    cells = sorted(next(iter(scored.values())), key=lambda cell: (cell[1], cell[0]))
    # Edits of one sequence stand and fall together, and the same facts are edited singly and in rows: groups that hold
    # whole sequences of every length are resampled, the same ones in every cell.
    group = math.lcm(*(length for _, length in cells))

    def unit(edit: EditKey) -> Hashable:
        return edit[0], edit[1] // group

    units = set.intersection(*({unit(edit) for edit in own[cell]} for own in scored.values() for cell in cells))
    if not units:
        return None
    values = {
        loss: {cell: {edit: value for edit, value in own[cell].items() if unit(edit) in units} for cell in cells}
        for loss, own in scored.items()
    }
    means = {loss: {cell: fmean(own[cell].values()) for cell in cells} for loss, own in values.items()}
    stops = [loss for loss in values if is_early_stopping(loss)]
    one = max(stops, key=lambda loss: fmean(means[loss].values()))
    best = {cell: max(stops, key=lambda loss: means[loss][cell]) for cell in cells}
    rivals = {ONE_THRESHOLD: dict.fromkeys(cells, one), EVERY_THRESHOLD: best}
    rows = []
    for loss, own in values.items():
        differences = {}
        for title, rival in rivals.items():
            if set(rival.values()) == {loss}:
                continue
            pairs = [(own[cell], values[rival[cell]][cell]) for cell in cells]
            difference = mean_paired_difference(pairs, unit, seed=seed)
            if difference is not None:
                differences[title] = difference
        rows.append(OverallRow(loss, fmean(means[loss].values()), differences))
    return Overall(method, scope, tuple(cells), tuple(rows), one, tuple(best[cell] for cell in cells), len(units))
