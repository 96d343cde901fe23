"""The figures of a report: overfitting (the paper's Figures 1, 2), averages by T (Figure 3), and forgetting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from overtone.lab.edit.compared import ABLATIONS, BASELINES, is_early_stopping
from overtone.lab.report.drawing import (
    COLOURS,
    add_legend,
    draw_curve,
    label_axes,
    panels,
    save_figure,
    styles_of,
)
from overtone.lab.report.overfitting import overfitting_figure
from overtone.lab.report.tables import AVERAGE
from overtone.lab.report.titles import data_title, method_title


def draw_figures(
    edits: pd.DataFrame, editing: pd.DataFrame, forgetting: pd.DataFrame, folder: Path
) -> dict[str, list[Path]]:
    """Draw what there is.

    Args:
        edits: as `overtone.lab.report.frame.load_results` reads them.
        editing: Table 1.
        forgetting: from `overtone.lab.report.forgetting.forgetting_table`.
        folder: for the images; it must exist.

    Returns:
        "overfitting", "lengths" and "forgetting" to the files of each.
    """
    measured = editing[(editing["source"] == "this run") & editing.get(AVERAGE, pd.Series(dtype=float)).notna()]
    drawn: dict[str, list[Path]] = {"overfitting": [], "lengths": [], "forgetting": []}
    for name, losses in loss_groups(list(edits["loss"].cat.categories)).items():
        figures = {
            "overfitting": overfitting_figures(_of(edits, losses)),
            "lengths": _by_method(_of(measured, losses), _lengths_figure),
            "forgetting": _by_method(_of(forgetting, losses), _forgetting_figure),
        }
        for kind, found in figures.items():
            for title, figure in found:
                path = folder / ("-".join(filter(None, [kind, title, name])) + ".png")
                save_figure(figure, path)
                drawn[kind].append(path)
    return drawn


def loss_groups(losses: Sequence[str]) -> dict[str, list[str]]:
    """The losses of each figure: the main ones, all thresholds of early stopping, the ablations.

    Returns:
        A name, "" for the main losses, to at most as many losses as there are colours; every loss is in one group.
    """
    thresholds = [loss for loss in losses if is_early_stopping(loss)]
    ablations = [loss for loss in losses if loss in ABLATIONS]
    main = [loss for loss in losses if loss in BASELINES or loss not in (*thresholds, *ablations)]
    groups = {"": main}
    if set(thresholds) - {*BASELINES}:
        groups["thresholds"] = thresholds
    if ablations:
        groups["ablations"] = [*ablations, *(loss for loss in ("cross_entropy", "overtone") if loss in main)]
    return {
        "-".join(filter(None, [name, str(number) if number > 1 else ""])): group[start : start + len(COLOURS)]
        for name, group in groups.items()
        for number, start in enumerate(range(0, len(group), len(COLOURS)), 1)
    }


def _of(table: pd.DataFrame, losses: Sequence[str]) -> pd.DataFrame:
    return table[table["loss"].isin(losses)] if len(table) else table


def overfitting_figures(edits: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """A name and a figure for each data and method with edits that were watched step by step."""
    traced = edits.dropna(subset=["trace"])
    for (data, method), own in traced.groupby(["data", "method"], observed=True):
        count = own.groupby(["seed", "index"]).ngroups
        traces = {loss: group["trace"].tolist() for loss, group in own.groupby("loss", observed=True)}
        title = f"{data_title(data)}, {method_title(method)}: mean of {count} single edits"
        yield f"{data}-{method}", overfitting_figure(traces, title=title)


def _by_method(table: pd.DataFrame, draw: Any) -> Iterator[tuple[str, Figure]]:
    """A figure for each method with settings, numbered where a method has several."""
    if table.empty:
        return
    for method, own in table.groupby("method", observed=True):
        for number, (settings, same) in enumerate(own.groupby("settings"), 1):
            figure = draw(same, f"{method_title(method)}{f' ({settings})' if own['settings'].nunique() > 1 else ''}")
            if figure is not None:
                yield "-".join(filter(None, [str(method), str(number) if number > 1 else ""])), figure


def _lengths_figure(table: pd.DataFrame, method: str) -> Figure | None:
    several = table.groupby("data", observed=True)["length"].transform("nunique") > 1
    table = table[several]
    if table.empty:
        return None
    figure, all_axes = _curves(table, "length", AVERAGE, f"{method}: average by number of edits in a row")
    for data, axes in all_axes.items():
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted(table["length"].unique())))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        label_axes(axes, data_title(data), "edits in a row, T", "average, %")
    return figure


def _forgetting_figure(table: pd.DataFrame, method: str) -> Figure:
    table = table.assign(age=(table["youngest"] + table["oldest"]) / 2)
    figure, all_axes = _curves(table, "age", "rel", f"{method}: reliability of an edit after later ones")
    for data, axes in all_axes.items():
        length = table.loc[table["data"] == data, "length"].iloc[0]
        label_axes(axes, f"{data_title(data)}, T = {length}", "edits made since", "Rel, %")
    return figure


def _curves(table: pd.DataFrame, x: str, y: str, title: str) -> tuple[Figure, Mapping[str, Any]]:
    data = list(dict.fromkeys(table["data"]))
    styles = styles_of(dict.fromkeys(table["loss"]))
    figure, all_axes = panels(data, styles, title)
    by_data = dict(zip(data, all_axes, strict=True))
    for (name, loss), own in table.groupby(["data", "loss"], sort=False, observed=True):
        own = own.sort_values(x)
        draw_curve(by_data[name], own[x], own[y], own[f"{y} low"], own[f"{y} high"], styles[loss])
    add_legend(figure)
    return figure, by_data
