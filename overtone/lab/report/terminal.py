"""A report at a glance, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table

from overtone.lab.report.cells import COLUMNS, Column, signed
from overtone.lab.report.tables import AVERAGE, BEST_BASELINE, BEST_STOP
from overtone.lab.report.titles import data_title, loss_title, method_title

_MEASURES: Mapping[str, Column] = {
    **{name: COLUMNS[name] for name in ("rel", "gen", "por", "loc")},
    AVERAGE: replace(COLUMNS[AVERAGE], heading="Avg", interval_decimals=0),
    "exact match": replace(COLUMNS["exact match"], heading="Exact\nmatch"),
    "gen begins": replace(COLUMNS["gen begins"], heading="Gen\nbegins"),
    "gen said": replace(COLUMNS["gen said"], heading="Gen\nsaid"),
    "kl": COLUMNS["kl"],
    "steps": COLUMNS["steps"],
}
_EXPLAINED = {
    "exact match": "Exact match: greedy generation, mean of the same four.",
    "gen begins": "Gen begins: greedy generation after the rephrased prompt begins with the answer.",
    "gen said": "Gen said: it does so as text without case, accents, punctuation and article, or with an alias.",
    "kl": "KL: from the unedited model on locality probes, in nats.",
}
"""What the caption says of the columns that not every run has."""


def measures_of_single_edits(editing: pd.DataFrame) -> Table:
    """Every measure with its 95% interval under it: the table of a run of single edits.

    Args:
        editing: Table 1, from `overtone.lab.report.tables.editing_table`.
    """
    own = editing[(editing["source"] == "this run") & (editing["length"] == 1)]
    shown = {name: column for name, column in _MEASURES.items() if name in own and own[name].notna().any()}
    explained = "".join(f"{text} " for name, text in _EXPLAINED.items() if name in shown)
    table = _table(
        "Single edits",
        "Mean over single edits and its 95% bootstrap interval. Rel, Gen, Por, Loc: teacher-forced token accuracy in "
        f"%, Avg: their mean. {explained}The optimiser is the same for every loss.",
        padding=0,
    )
    for column in shown.values():
        table.add_column(column.heading, justify="right", no_wrap=True)
    for (data, method, settings), rows in own.groupby(["data", "method", "settings"], sort=False, observed=True):
        table.add_section()
        table.add_row(f"[bold]{method_title(method)}[/bold] [dim]{data_title(data)}, {settings}[/dim]")
        for row in rows.to_dict("records"):
            cells = [_with_interval(row, name, column) for name, column in shown.items()]
            table.add_row(loss_title(row["loss"]), *cells)
    return table


def averages_by_length(editing: pd.DataFrame) -> Table:
    """A line per data, method and loss: for each T the average and its difference to the best early stopping.

    Args:
        editing: Table 1, from `overtone.lab.report.tables.editing_table`.
    """
    own = editing[editing["source"] == "this run"]
    lengths = sorted(own["length"].unique())
    table = _table(
        "Average in %, and difference to the best early stopping",
        "Where none was run the difference is to the best baseline. Bold: its 95% interval excludes 0 and can be "
        "trusted; =: the rival itself.",
        padding=(0, 1, 0, 0),
    )
    for length in lengths:
        table.add_column(f"T = {length}", justify="right", no_wrap=True)
        table.add_column("diff", justify="right", no_wrap=True)
    for (data, method, settings), rows in own.groupby(["data", "method", "settings"], sort=False, observed=True):
        table.add_section()
        table.add_row(f"[bold]{data_title(data)}, {method_title(method)}[/bold] [dim]{settings}[/dim]")
        for loss, of_loss in rows.groupby("loss", sort=False, observed=True):
            at = {row["length"]: row for row in of_loss.to_dict("records")}
            cells = [cell for length in lengths for cell in _average_and_difference(at.get(length))]
            table.add_row(loss_title(loss), *cells)
    return table


def _table(title: str, caption: str, *, padding: int | Sequence[int]) -> Table:
    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=padding,  # type: ignore[arg-type]
    )
    table.add_column("Loss")
    return table


def _with_interval(row: Mapping[str, Any], name: str, column: Column) -> str:
    ends = column.interval(row, name)
    mean = column.mean(row, name) or "-"
    return f"{mean}\n[dim]{ends[0]}-{ends[1]}[/dim]" if ends else mean


def _average_and_difference(row: Mapping[str, Any] | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    average = COLUMNS[AVERAGE].mean(row, AVERAGE)
    if average is None:
        return "failed", ""
    rival = BEST_BASELINE if pd.isna(row.get(BEST_STOP)) else BEST_STOP
    if row.get(rival) == row["loss"]:
        return average, "="
    name = f"difference to {rival}"
    if pd.isna(row.get(name)):
        return average, ""
    text = signed(row[name])
    return average, f"[bold]{text}[/bold]" if row[f"{name} clear"] is True else text
