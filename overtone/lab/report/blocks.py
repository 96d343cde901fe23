"""Tables as a document shows them: headings, and cells of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from overtone.lab.edit.compared import is_early_stopping
from overtone.lab.report.cells import COLUMNS, Column, signed
from overtone.lab.report.frame import BLOCK
from overtone.lab.report.overall import EVERY_THRESHOLD, ONE_THRESHOLD
from overtone.lab.report.tables import (
    ANCHORED,
    AVERAGE,
    BEST_BASELINE,
    BEST_STOP,
    ENOUGH_UNITS,
    FULL_LOSS,
    counts_old_answers,
    is_sampled,
)
from overtone.lab.report.titles import data_title, length_title, loss_title, method_title

EDITING = (
    *("rel", "gen", "por", "loc", AVERAGE, "por of others", "gen begins", "gen said"),
    *("kl", "perplexity", "steps", "seconds"),
)
"""The measures that Tables 1 and 3 show, where there are any."""


@dataclass(frozen=True)
class Block:
    """A table of a document: titles, remarks, a heading line and cells."""

    data: str
    length: str
    method: str
    about: list[str]
    head: list[str]
    rows: list[list[str]]


def editing_blocks(table: pd.DataFrame) -> list[Block]:
    """Of Table 1 or 3."""
    return _blocks(table, {name: COLUMNS[name] for name in EDITING})


def question_blocks(table: pd.DataFrame, questions: Sequence[str]) -> list[Block]:
    """Of Table 2."""
    asked = {
        name: Column(name[:1].upper() + name[1:], interval_decimals=None if counts_old_answers(name) else 0)
        for name in questions
    }
    return _blocks(table, {"rel": COLUMNS["rel"], **asked, AVERAGE: COLUMNS[AVERAGE]})


def overall_blocks(table: pd.DataFrame) -> list[Block]:
    """Of Table 4, the losses from the best to the worst."""
    blocks = []
    for (method, settings, scope), own in _groups(table, ["method", "settings", "scope"]):
        first = own.iloc[0]
        columns = zip(first["columns"].split("; "), first[EVERY_THRESHOLD].split("; "), strict=True)
        about = [
            scope,
            f"{first['units']} groups of edits resampled",
            f"best single threshold: {loss_title(first[ONE_THRESHOLD])}",
            "columns, with the best threshold of each: "
            + ", ".join(f"{column} ({loss_title(threshold)})" for column, threshold in columns),
        ]
        rivals = [ONE_THRESHOLD, EVERY_THRESHOLD]
        rows = [
            [loss_title(row["loss"]), f"{100 * row[AVERAGE]:.1f}", *(_difference(row, rival) for rival in rivals)]
            for row in own.sort_values(AVERAGE, ascending=False).to_dict("records")
        ]
        head = ["Loss", "Average", *(f"Difference to {rival}" for rival in rivals)]
        blocks.append(Block("", "", _method(method, settings), about, head, rows))
    return blocks


def _blocks(table: pd.DataFrame, columns: Mapping[str, Column]) -> list[Block]:
    return [_block(where, own, columns) for where, own in _groups(table, BLOCK)]


def _groups(table: pd.DataFrame, names: list[str]) -> Any:
    return table.groupby(names, sort=False, observed=True) if len(table) else ()


def _block(where: Sequence[Any], table: pd.DataFrame, columns: Mapping[str, Column]) -> Block:
    data, length, method, settings = where
    own = table[table["source"] == "this run"]
    shown = {name: column for name, column in columns.items() if name in own and own[name].notna().any()}
    rivals = [
        name for name in (BEST_BASELINE, BEST_STOP, ANCHORED, FULL_LOSS) if name in own and own[name].notna().any()
    ]
    head = ["Loss", *(column.heading for column in shown.values()), *(f"Difference to {name}" for name in rivals)]
    return Block(
        data_title(data),
        length_title(length),
        _method(method, settings),
        list(_about(own)),
        [*head, "Edits"],
        [_cells(row, shown, rivals) for row in table.to_dict("records")],
    )


def _method(name: str, settings: str) -> str:
    return f"{method_title(name)}, {settings}" if settings else method_title(name)


def _about(table: pd.DataFrame) -> Any:
    first = table.iloc[0]
    seeds = f"{first['seeds']} seed{'s' if first['seeds'] > 1 else ''}"
    units = first["units"]
    yield f"{units} {first['resampled']} of {seeds} resampled" if units > 1 else f"one edit of {seeds}"
    if BEST_BASELINE in table and pd.notna(first[BEST_BASELINE]):
        yield f"best baseline: {loss_title(first[BEST_BASELINE])}"
    if BEST_STOP in table and pd.notna(first[BEST_STOP]):
        tried = sum(map(is_early_stopping, table["loss"]))
        of_how_many = f"the best of {tried} thresholds" if tried > 1 else "the only threshold here"
        yield f"best early stopping: {loss_title(first[BEST_STOP])}, {of_how_many}"
    if ANCHORED in table and pd.notna(first[ANCHORED]):
        yield f"anchored cross-entropy: {loss_title(first[ANCHORED])}"
    if units < ENOUGH_UNITS or (first["length"] > 1 and first["resampled"] == "edits"):
        yield "too few independent edits or sequences for intervals to be trusted, so nothing is bold"


def _cells(row: Mapping[str, Any], columns: Mapping[str, Column], rivals: Sequence[str]) -> list[str]:
    if row["source"] != "this run":
        means = (column.mean(_as_measured(row, columns), name) for name, column in columns.items())
        return [f"*{row['source']}*", *(f"*{mean}*" if mean else "" for mean in means), *("" for _ in rivals), ""]
    cells = [loss_title(row["loss"]), *(_interval(row, name, column) for name, column in columns.items())]
    failed = f" ({row['failed']} failed)" if row["failed"] else ""
    return [*cells, *(_difference(row, rival) for rival in rivals), f"{row['edits']}{failed}"]


def _as_measured(row: Mapping[str, Any], columns: Mapping[str, Column]) -> dict[str, Any]:
    """A row of the paper, whose "single-hop" is at temperature 0.1."""
    hops = {name: name.partition(",")[0] for name in columns if is_sampled(name) and not counts_old_answers(name)}
    return {**row, **{name: row.get(kind) for name, kind in hops.items()}}


def _interval(row: Mapping[str, Any], name: str, column: Column) -> str:
    ends = column.interval(row, name)
    mean = column.mean(row, name) or "-"
    return f"{mean} ({ends[0]} to {ends[1]})" if ends else mean


def _difference(row: Mapping[str, Any], rival: str) -> str:
    """In points with its interval; bold if it is clear."""
    if row.get(rival) == row["loss"]:
        return "reference"
    name = f"difference to {rival}"
    mean, low, high = (row.get(f"{name}{end}", math.nan) for end in ("", " low", " high"))
    if pd.isna(mean):
        return "-"
    text = signed(mean) if pd.isna(low) else f"{signed(mean)} ({signed(low)} to {signed(high)})"
    return f"**{text}**" if row[f"{name} clear"] is True else text
