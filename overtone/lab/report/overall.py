"""Table 4: each loss with one setting over all data and lengths of a method, beside the best early stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from overtone.lab.edit.compared import is_early_stopping
from overtone.lab.report.statistics import bootstrap_difference
from overtone.lab.report.tables import AVERAGE, ENOUGH_UNITS

ONE_THRESHOLD, EVERY_THRESHOLD = "best single threshold", "best threshold of each column"
"""What a row is compared to: the early stop that is best on the mean of all columns, and the best one in each."""


def overall_table(edits: pd.DataFrame) -> pd.DataFrame:
    """For each method: over single edits, over edits in a row, and over both; where there are several columns.

    A column is one data and T. Those of fewer sequences than `ENOUGH_UNITS` are left out, and so are losses that some
    column does not have. The same facts are edited singly and in rows, so groups of edits that hold whole sequences of
    every length are resampled, the same ones in every column; only groups that every loss has in every column count.
    """
    rows: list[dict[str, Any]] = []
    for (method, settings), own in edits.groupby(["method", "settings"], observed=True):
        sequence = own["seed"].astype(str) + " " + own["sequence"].astype(str)
        sequences = sequence.groupby([own["data"], own["length"]], observed=True).transform("nunique")
        own = own[sequences >= ENOUGH_UNITS]
        scopes = {
            "single edits": own[own["length"] == 1],
            "edits in a row": own[own["length"] > 1],
            "single edits and edits in a row": own,
        }
        seen: list[pd.Index] = []
        for scope, chosen in scopes.items():
            values = _values(chosen)
            cells = values.columns.droplevel("loss").unique() if len(values) else values.columns
            if len(cells) > 1 and not any(cells.equals(other) for other in seen):
                seen.append(cells)
                where = {"method": method, "settings": settings, "scope": scope}
                rows += [{**where, **row} for row in _rows(values)]
    return pd.DataFrame(rows)


def _values(edits: pd.DataFrame) -> pd.DataFrame:
    """Averages: a row an edit, a column for each loss, data and T that every loss has."""
    values = edits.pivot_table(
        values=AVERAGE, index=["seed", "index"], columns=["loss", "length", "data"], observed=True
    )
    if values.empty:
        return values
    cells = values.columns.droplevel("loss").unique()
    losses = values.columns.get_level_values("loss")
    return values.loc[:, losses.value_counts()[losses].to_numpy() == len(cells)]


def _rows(values: pd.DataFrame) -> Iterator[dict[str, Any]]:
    losses = list(values.columns.get_level_values("loss").unique())
    stops = [loss for loss in losses if is_early_stopping(loss)]
    if not stops:
        return
    cells = values[losses[0]].columns
    group = math.lcm(*(length for length, _ in cells))
    seeds, indices = (values.index.get_level_values(level) for level in (0, 1))
    units = pd.Series(values.groupby([seeds, indices // group]).ngroup(), index=values.index)
    is_whole = values.notna().groupby(units).any().all(axis="columns")
    values = values[units.isin(is_whole[is_whole].index)]
    if values.empty:
        return
    units = units.loc[values.index]
    means = values.mean().unstack("loss")
    one = str(means[stops].mean().idxmax())
    best = means[stops].idxmax(axis="columns")
    columns = "; ".join(f"{data} T={length}" for length, data in means.index)
    for loss in losses:
        row: dict[str, Any] = {"columns": columns, "loss": loss, AVERAGE: means[loss].mean()}
        row |= {ONE_THRESHOLD: one, EVERY_THRESHOLD: "; ".join(best), "units": units.nunique()}
        for title, rival in ((ONE_THRESHOLD, best.map(lambda _: one)), (EVERY_THRESHOLD, best)):
            if set(rival) == {loss}:
                continue
            differences = pd.concat([values[loss][cell] - values[rival[cell]][cell] for cell in means.index], axis=1)
            found = bootstrap_difference(differences, units)
            name = f"difference to {title}"
            row |= {name: found.mean, f"{name} low": found.low, f"{name} high": found.high}
            row[f"{name} clear"] = units.nunique() >= ENOUGH_UNITS and found.excludes_zero
        yield row
