"""Overfitting, drawn: losses step by step and token by token, in the manner of the paper's Figures 1 and 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from overtone.lab.losses import LOSSES
from overtone.lab.records import EditRecord
from overtone.lab.traces import EditTrace

_COLOURS = ("#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#0072B2", "#009E73", "#F0E442")
"""Okabe and Ito's palette, which colour-blind readers tell apart."""

_DASHES = ("-", "--", ":", "-.")
"""As many as have no divisor in common with the colours, so that losses share both only after 28."""


def draw_overfitting(records: Sequence[EditRecord], path: Path, *, title: str) -> None:
    """Draw the traces of one method: a line per loss, averaged over edits.

    Generality and portability loss after every step (an edit that ended early keeps its last value); the loss of each
    target token before the edit; the underfitting degree of each target token after it, negative where overfitted.

    Args:
        records: of one method; those without a trace are passed over.
        path: the image; its suffix chooses the format.
        title: above the figure.

    Raises:
        ImportError: matplotlib is not there.
        ValueError: no record has a trace.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "overtone[lab]"') from error

    traces: dict[str, list[EditTrace]] = {}
    for record in records:
        if record.trace is not None:
            traces.setdefault(record.loss, []).append(record.trace)
    if not traces:
        raise ValueError("no record has a trace: nothing to draw")

    figure = Figure(figsize=(3.5, 4.0), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=7)
    (generality, portability), (initial, underfitting) = figure.subplots(2, 2)
    last_step = max(trace.steps[-1] for group in traces.values() for trace in group)
    for loss, group in traces.items():
        style: dict[str, Any] = {
            **_style(loss),
            "linewidth": 1.2,
            "label": LOSSES[loss].title,
        }
        for axes, curves in (
            (generality, [(trace.steps, trace.generality_loss) for trace in group]),
            (portability, [(trace.steps, trace.portability_loss) for trace in group]),
        ):
            axes.plot(*_mean_curve(curves, last_step), **style)
        degrees = _mean_per_position([trace.underfitting for trace in group])
        marker = "o" if len(degrees) <= 10 else None
        underfitting.plot(range(1, len(degrees) + 1), degrees, marker=marker, markersize=2, **style)
    losses_before = _mean_per_position([trace.initial_loss for trace in next(iter(traces.values()))])
    initial.bar(range(1, len(losses_before) + 1), losses_before, color="#777777")
    initial.axhline(float(np.mean(losses_before)), color="black", linewidth=0.7, linestyle="--")
    underfitting.axhline(0.0, color="black", linewidth=0.7)

    for axes in (generality, portability):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    _label(generality, "a  Generality loss", "editing step", "nats, log scale")
    _label(portability, "b  Portability loss", "editing step", "nats, log scale")
    _label(initial, "c  Loss before the edit", "target token", "nats")
    _label(underfitting, "d  Underfitting degree", "target token", "nats (below 0: overfitted)")
    handles, labels = generality.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=6, frameon=False, handlelength=2.6)
    figure.savefig(path)


def _style(loss: str) -> dict[str, str]:
    """The same in every figure, whichever other losses are drawn."""
    position = list(LOSSES).index(loss)
    return {"color": _COLOURS[position % len(_COLOURS)], "linestyle": _DASHES[position % len(_DASHES)]}


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=7, loc="left")
    axes.set_xlabel(x, fontsize=6)
    axes.set_ylabel(y, fontsize=6)
    axes.tick_params(labelsize=6, width=0.6, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _mean_curve(
    curves: Sequence[tuple[Sequence[int], Sequence[float]]], last_step: int
) -> tuple[list[int], list[float]]:
    """Steps and the mean at each, over curves that keep their last value to the last step where they end early."""
    steps = sorted({last_step, *(step for known, _ in curves for step in known)})
    # np.interp holds the last value beyond the end, and draws between the steps that a curve has.
    return steps, np.mean([np.interp(steps, known, values) for known, values in curves], axis=0).tolist()


def _mean_per_position(rows: Sequence[Sequence[float]]) -> list[float]:
    """The mean at each position over the rows that reach it, as far as at least half of the rows do."""
    lengths = sorted(map(len, rows), reverse=True)
    reached = lengths[(len(lengths) - 1) // 2]
    return [float(np.mean([row[position] for row in rows if len(row) > position])) for position in range(reached)]
