"""Overfitting, drawn: losses step by step and token by token, in the manner of the paper's Figures 1 and 2."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from overtone.lab.losses import ABLATIONS, EARLY_STOPPING_THRESHOLDS, LOSSES, parse_loss
from overtone.lab.titles import loss_title
from overtone.lab.traces import EditTrace

LINE_COLOURS = ("#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#0072B2", "#009E73", "#000000", "#882255")
"""Okabe and Ito's palette without its yellow, which is hard to see on white, and a wine red of Tol's instead."""

_DASHES = ("-", "--", ":", "-.")

_LEGEND_WIDTH = 26
"""Characters at which the name of a loss goes on in the next line."""


class Traced(Protocol):
    """A record of an edit whose steps may have been watched."""

    @property
    def loss(self) -> str:
        """The canonical spec of the loss."""

    @property
    def trace(self) -> EditTrace | None:
        """What was seen."""


def draw_overfitting(records: Sequence[Traced], path: Path, *, title: str) -> None:
    """Draw the traces of one method as `overfitting_figure` does.

    Args:
        records: of one method; those without a trace are passed over.
        path: the image; its suffix chooses the format.
        title: above the figure.

    Raises:
        ImportError: matplotlib is not there.
        ValueError: no record has a trace.
    """
    save_figure(overfitting_figure(records, title=title), path)


def overfitting_figure(
    records: Sequence[Traced], *, title: str, styles: Mapping[str, dict[str, Any]] | None = None
) -> Any:
    """The traces of one method: a line per loss, averaged over edits.

    Generality and portability loss after every step (an edit that ended early keeps its last value); the loss of each
    target token before the edit; the underfitting degree of each target token after it, negative where overfitted.

    Args:
        records: of one method; those without a trace are passed over.
        title: above the figure.
        styles: from `loss_styles`; None: those of the losses that are drawn.

    Raises:
        ImportError: matplotlib is not there.
        ValueError: no record has a trace.
    """
    traces: dict[str, list[EditTrace]] = {}
    for record in records:
        if record.trace is not None:
            traces.setdefault(record.loss, []).append(record.trace)
    if not traces:
        raise ValueError("no record has a trace: nothing to draw")
    styles = styles or loss_styles(traces)

    figure = new_figure(4.0, title=title)
    from matplotlib.ticker import LogLocator, NullLocator

    (generality, portability), (initial, underfitting) = figure.subplots(2, 2)
    last_step = max(trace.steps[-1] for group in traces.values() for trace in group)
    for loss, group in traces.items():
        style = {**styles[loss], "linewidth": 1.2}
        for axes, curves in (
            (generality, [(trace.steps, trace.generality_loss) for trace in group]),
            (portability, [(trace.steps, trace.portability_loss) for trace in group]),
        ):
            curves = [(steps, losses) for steps, losses in curves if losses]
            if curves:
                axes.plot(*_mean_curve(curves, last_step), **style)
        degrees = _mean_per_position([trace.underfitting for trace in group])
        marker = "o" if len(degrees) <= 10 else None
        underfitting.plot(range(1, len(degrees) + 1), degrees, marker=marker, markersize=2, **style)
    losses_before = _mean_per_position([trace.initial_loss for trace in next(iter(traces.values()))])
    initial.bar(range(1, len(losses_before) + 1), losses_before, color="#777777")
    initial.axhline(float(np.mean(losses_before)), color="black", linewidth=0.7, linestyle="--")
    underfitting.axhline(0.0, color="black", linewidth=0.7)

    for axes in (generality, portability):
        if not axes.lines:
            axes.text(0.5, 0.5, "no such probes", fontsize=6, ha="center", transform=axes.transAxes)
            axes.tick_params(labelbottom=False, labelleft=False)
            continue
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    label_axes(generality, "a  Generality loss", "editing step", "nats, log scale")
    label_axes(portability, "b  Portability loss", "editing step", "nats, log scale")
    label_axes(initial, "c  Loss before the edit", "target token", "nats")
    label_axes(underfitting, "d  Underfitting degree", "target token", "nats (below 0: overfitted)")
    for axes in (generality, portability, initial, underfitting):
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    add_legend(figure)
    return figure


def loss_styles(losses: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, dashes and label of each loss.

    A loss that the lab knows looks the same in every figure, in a colour that no other has in the figures of
    `overtone.lab.bench_figures`. Others follow in their order, the first two in colours of their own, too; no two of
    the first ten look alike.

    Args:
        losses: specs.
    """
    losses = list(losses)
    places = dict(_KNOWN_PLACES)
    next_place = 2 * len(LINE_COLOURS) + len(LOSSES)
    for loss in losses:
        if loss not in places:
            places[loss] = next_place
            next_place += 1
    return {loss: {**_line(places[loss]), "label": textwrap.fill(loss_title(loss), _LEGEND_WIDTH)} for loss in losses}


def _known_places() -> dict[str, int]:
    """Places in the cycle of colours such that losses that are drawn together differ in colour."""
    places = {loss: place for place, loss in enumerate(LOSSES)}
    thresholds = [parse_loss(f"early_stopping:stop_below={value}").name for value in EARLY_STOPPING_THRESHOLDS]
    for group, companions in (
        (thresholds, ("early_stopping", "overtone", "overtone_held")),
        (ABLATIONS, ("cross_entropy", "overtone")),
    ):
        reserved = {places[loss] % len(LINE_COLOURS) for loss in companions}
        place = max(places.values()) + 1
        for loss in group:
            while place % len(LINE_COLOURS) in reserved:
                place += 1
            if loss not in places:
                places[loss] = place
                place += 1
    return places


_KNOWN_PLACES = _known_places()


def _line(place: int) -> dict[str, str]:
    round_trips = place // len(LINE_COLOURS)
    return {
        "color": LINE_COLOURS[place % len(LINE_COLOURS)],
        "linestyle": _DASHES[(place + round_trips) % len(_DASHES)],
    }


def new_figure(height: float, *, title: str) -> Any:
    """An empty figure as wide as a column of the paper, 3.5 inches.

    Args:
        height: in inches.
        title: above the figure.

    Raises:
        ImportError: matplotlib is not there.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "overtone[lab]"') from error
    figure = Figure(figsize=(3.5, height), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=7)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, the same bytes for the same figure; the path's suffix chooses the format."""
    from matplotlib import rc_context
    from PIL import Image

    if path.suffix == ".png":
        # A palette makes the file a quarter as large, and the eye does not see it.
        figure.canvas.draw()
        image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
        palette = image.quantize(256, dither=Image.Dither.NONE)
        palette.save(path, optimize=True, dpi=(figure.dpi, figure.dpi))
        return
    with rc_context({"svg.hashsalt": "overtone"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def label_axes(axes: Any, title: str, x: str, y: str) -> None:
    """Title, axis labels and the plain look of all figures."""
    axes.set_title(title, fontsize=7, loc="left")
    axes.set_xlabel(x, fontsize=6)
    axes.set_ylabel(y, fontsize=6)
    axes.tick_params(labelsize=6, width=0.6, length=2)
    axes.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Any) -> None:
    """Below the figure, each loss that some axes of it show."""
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=2,
        fontsize=6,
        frameon=False,
        handlelength=2.6,
    )


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
