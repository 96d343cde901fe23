"""The figures of a bench: overfitting (the paper's Figures 1, 2), averages by T (Figure 3), and forgetting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overtone.lab.bench_tables import AVERAGE, Block, is_early_stopping, resampled_units
from overtone.lab.comparison import bootstrap_mean
from overtone.lab.figures import add_legend, label_axes, loss_styles, new_figure, overfitting_figure, save_figure
from overtone.lab.losses import ABLATIONS
from overtone.lab.outcomes import EditOutcome
from overtone.lab.summary import Estimate
from overtone.lab.titles import data_title, method_title

MOST_LINES = 8
"""In one figure; as many as there are colours."""

_AGE_BINS = 10


@dataclass(frozen=True)
class ForgettingPoint:
    """Reliability of the edits of a sequence after which between `youngest` and `oldest` others were made."""

    data: str
    method: str
    length: int
    loss: str
    youngest: int
    oldest: int
    rel: Estimate


def loss_groups(losses: Sequence[str]) -> dict[str, list[str]]:
    """The losses of each figure: the main ones, all thresholds of early stopping, the ablations.

    Returns:
        A name, "" for the main losses, to at most `MOST_LINES` losses; every loss is in one group at least.
    """
    thresholds = [loss for loss in losses if is_early_stopping(loss)]
    ablations = [loss for loss in losses if loss in ABLATIONS]
    main = [loss for loss in losses if loss == "early_stopping" or loss not in (*thresholds, *ablations)]
    groups = _in_parts("", main, [])
    if set(thresholds) - {"early_stopping"}:
        groups |= _in_parts("thresholds", thresholds, [loss for loss in ("overtone", "overtone_held") if loss in main])
    return groups | _in_parts("ablations", ablations, [loss for loss in ("cross_entropy", "overtone") if loss in main])


def _in_parts(name: str, losses: Sequence[str], companions: Sequence[str]) -> dict[str, list[str]]:
    size = MOST_LINES - len(companions)
    parts = [[*losses[start : start + size], *companions] for start in range(0, len(losses), size)]
    return {
        "-".join(filter(None, [name, str(part) if part > 1 else ""])): chosen for part, chosen in enumerate(parts, 1)
    }


def draw_figures(
    outcomes: Sequence[EditOutcome], blocks: Sequence[Block], points: Sequence[ForgettingPoint], folder: Path
) -> dict[str, list[Path]]:
    """Draw what there is, each figure as PNG and SVG.

    Args:
        outcomes: of whole sequences.
        blocks: of Table 1.
        points: from `forgetting`.
        folder: for the images; it must exist.

    Returns:
        "overfitting", "lengths" and "forgetting" to the PNG files of each.

    Raises:
        ImportError: matplotlib is not there.
    """
    losses = list(dict.fromkeys(outcome.loss for outcome in outcomes))
    styles = loss_styles(losses)
    drawn: dict[str, list[Path]] = {"overfitting": [], "lengths": [], "forgetting": []}

    def save(figure: Any, kind: str, *names: str) -> None:
        stem = "-".join([kind, *filter(None, names)])
        for suffix in ("png", "svg"):
            save_figure(figure, folder / f"{stem}.{suffix}")
        drawn[kind].append(folder / f"{stem}.png")

    for group, chosen in loss_groups(losses).items():
        traced = [outcome for outcome in outcomes if outcome.trace is not None and outcome.loss in chosen]
        for data, method in dict.fromkeys((outcome.data, outcome.method) for outcome in traced):
            of_both = [outcome for outcome in traced if (outcome.data, outcome.method) == (data, method)]
            edits = len({(outcome.seed, outcome.index) for outcome in of_both})
            title = f"{data_title(data)}, {method_title(method)}: mean of {edits} single edits"
            save(overfitting_figure(of_both, title=title, styles=styles), "overfitting", data, method, group)
        for method in dict.fromkeys(block.method for block in blocks):
            by_length = _by_length([block for block in blocks if block.method == method], chosen)
            if by_length:
                save(_lengths_figure(by_length, styles, method), "lengths", method, group)
            by_age = [point for point in points if point.method == method and point.loss in chosen]
            if by_age:
                save(_forgetting_figure(by_age, styles, method), "forgetting", method, group)
    return drawn


def forgetting(outcomes: Sequence[EditOutcome], *, seed: int = 0) -> list[ForgettingPoint]:
    """Reliability after the last edit by age, over the longest sequences of each data and method."""
    longest: dict[tuple[str, str], int] = {}
    for outcome in outcomes:
        key = outcome.data, outcome.method
        longest[key] = max(longest.get(key, 2), outcome.length)
    groups: dict[tuple[str, str, int, str, int], list[EditOutcome]] = {}
    for outcome in outcomes:
        if outcome.length == longest[outcome.data, outcome.method] and outcome.scores is not None:
            bins = min(_AGE_BINS, outcome.length)
            place = (outcome.length - 1 - outcome.position) * bins // outcome.length
            key_of_bin = (outcome.data, outcome.method, outcome.length, outcome.loss, place)
            groups.setdefault(key_of_bin, []).append(outcome)
    points = []
    for (data, method, length, loss, _), group in sorted(groups.items(), key=lambda item: item[0][-1]):
        ages = [outcome.length - 1 - outcome.position for outcome in group]
        values = [outcome.scores.accuracy["rel"] for outcome in group if outcome.scores is not None]
        rel = bootstrap_mean(values, resampled_units(group)[1], seed=seed)
        points.append(ForgettingPoint(data, method, length, loss, min(ages), max(ages), rel))
    return points


Curve = tuple[list[float], list[Estimate]]
"""Positions along x, and what is there."""


def _by_length(blocks: Sequence[Block], losses: Sequence[str]) -> dict[str, dict[str, Curve]]:
    """Data to loss to average by T, for data with more than one T."""
    panels: dict[str, dict[str, Curve]] = {}
    for block in blocks:
        for row in block.rows:
            if row.loss in losses and AVERAGE in row.measures:
                lengths, averages = panels.setdefault(block.data, {}).setdefault(row.loss, ([], []))
                lengths.append(float(block.length))
                averages.append(row.measures[AVERAGE])
    return {
        data: curves
        for data, curves in panels.items()
        if len({length for lengths, _ in curves.values() for length in lengths}) > 1
    }


def _lengths_figure(panels: Mapping[str, dict[str, Curve]], styles: Mapping[str, dict[str, Any]], method: str) -> Any:
    from matplotlib.ticker import FixedLocator, NullLocator

    figure, all_axes = _panels(panels, styles, f"{method_title(method)}: average by number of edits in a row")
    for axes, (data, curves) in zip(all_axes, panels.items(), strict=True):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted({x for xs, _ in curves.values() for x in xs})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        label_axes(axes, data_title(data), "edits in a row, T", "average, %")
    return figure


def _forgetting_figure(points: Sequence[ForgettingPoint], styles: Mapping[str, dict[str, Any]], method: str) -> Any:
    panels: dict[str, dict[str, Curve]] = {}
    lengths: dict[str, int] = {}
    for point in points:
        ages, estimates = panels.setdefault(point.data, {}).setdefault(point.loss, ([], []))
        ages.append((point.youngest + point.oldest) / 2)
        estimates.append(point.rel)
        lengths[point.data] = point.length
    figure, all_axes = _panels(panels, styles, f"{method_title(method)}: reliability of an edit after later ones")
    for axes, data in zip(all_axes, panels, strict=True):
        label_axes(axes, f"{data_title(data)}, T = {lengths[data]}", "edits made since", "Rel, %")
    return figure


def _panels(
    panels: Mapping[str, dict[str, Curve]], styles: Mapping[str, dict[str, Any]], title: str
) -> tuple[Any, list[Any]]:
    """A figure with a panel per data, two in a row: lines with their intervals as bands, and one legend."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    labels = {styles[loss]["label"] for curves in panels.values() for loss in curves}
    legend_lines = sum(label.count("\n") + 1 for label in labels) / 2
    figure = new_figure(0.5 + 1.6 * rows + 0.12 * legend_lines, title=title)
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in all_axes[len(panels) :]:
        unused.remove()
    for axes, curves in zip(all_axes, panels.values(), strict=False):
        for loss, curve in curves.items():
            _draw_curve(axes, curve, styles[loss])
    add_legend(figure)
    return figure, all_axes[: len(panels)]


def _draw_curve(axes: Any, curve: Curve, style: dict[str, Any]) -> None:
    xs, estimates = curve
    axes.plot(xs, [100.0 * estimate.mean for estimate in estimates], marker="o", markersize=2, linewidth=1.2, **style)
    bounded = [
        (x, 100.0 * estimate.low, 100.0 * estimate.high)
        for x, estimate in zip(xs, estimates, strict=True)
        if estimate.low is not None and estimate.high is not None
    ]
    if bounded:
        axes.fill_between(*zip(*bounded, strict=True), color=style["color"], alpha=0.12, linewidth=0)
