"""Overfitting, drawn: losses step by step and token by token, in the manner of the paper's Figures 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from overtone.lab.report.drawing import add_legend, label_axes, new_figure, styles_of
from overtone.lab.score.traces import EditTrace


def overfitting_figure(traces: Mapping[str, Sequence[EditTrace]], *, title: str) -> Figure:
    """The traces of one method: a line a loss, averaged over edits.

    Generality and portability loss after every step (an edit that ended early keeps its last value); the loss of each
    target token before the edit; the underfitting degree of each target token after it, negative where overfitted.

    Args:
        traces: of each loss, at least one.
        title: above the figure.
    """
    figure = new_figure(4.0, title=title)
    (generality, portability), (initial, underfitting) = figure.subplots(2, 2)
    last_step = max(trace.steps[-1] for group in traces.values() for trace in group)
    styles = styles_of(traces)
    for loss, group in traces.items():
        style = {**styles[loss], "linewidth": 1.2}
        _draw_steps(generality, [(trace.steps, trace.generality_loss) for trace in group], last_step, style)
        _draw_steps(portability, [(trace.steps, trace.portability_loss) for trace in group], last_step, style)
        degrees = _mean_per_position([trace.underfitting for trace in group])
        marker = "o" if len(degrees) <= 10 else None
        underfitting.plot(range(1, len(degrees) + 1), degrees, marker=marker, markersize=2, **style)
    losses_before = _mean_per_position([trace.initial_loss for trace in next(iter(traces.values()))])
    initial.bar(range(1, len(losses_before) + 1), losses_before, color="#777777")
    initial.axhline(float(np.mean(losses_before)), color="black", linewidth=0.7, linestyle="--")
    underfitting.axhline(0.0, color="black", linewidth=0.7)
    for axes in (generality, portability):
        _make_logarithmic(axes)
    label_axes(generality, "a  Generality loss", "editing step", "nats, log scale")
    label_axes(portability, "b  Portability loss", "editing step", "nats, log scale")
    label_axes(initial, "c  Loss before the edit", "target token", "nats")
    label_axes(underfitting, "d  Underfitting degree", "target token", "nats (below 0: overfitted)")
    for axes in (generality, portability, initial, underfitting):
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    add_legend(figure)
    return figure


def _draw_steps(
    axes: Any, curves: Sequence[tuple[Sequence[int], Sequence[float]]], last_step: int, style: Mapping[str, Any]
) -> None:
    curves = [(steps, losses) for steps, losses in curves if losses]
    if not curves:
        return
    every = sorted({last_step, *(step for steps, _ in curves for step in steps)})
    # np.interp holds the last value beyond the end, and draws between the steps that a curve has.
    mean = np.mean([np.interp(every, steps, losses) for steps, losses in curves], axis=0)
    axes.plot(every, mean, **style)


def _make_logarithmic(axes: Any) -> None:
    if not axes.lines:
        axes.text(0.5, 0.5, "no such probes", fontsize=6, ha="center", transform=axes.transAxes)
        axes.tick_params(labelbottom=False, labelleft=False)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _mean_per_position(rows: Sequence[Sequence[float]]) -> list[float]:
    """The mean at each position over the rows that reach it, as far as at least half of the rows do."""
    lengths = sorted(map(len, rows), reverse=True)
    reached = lengths[(len(lengths) - 1) // 2]
    return [float(np.mean([row[position] for row in rows if len(row) > position])) for position in range(reached)]
