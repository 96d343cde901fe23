"""The look of all figures: colours, a legend, axes, and files of a few kilobytes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from overtone.lab.edit.compared import COMPARED
from overtone.lab.report.titles import loss_title

COLOURS = ("#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#0072B2", "#009E73", "#000000", "#882255")
"""Okabe and Ito's palette without its yellow, which is hard to see on white, and a wine red of Tol's instead."""

_KNOWN = dict(zip(COMPARED, COLOURS, strict=False))
"""The losses with a name have the same colour in every figure."""

_LEGEND_WIDTH = 26
"""Characters at which the name of a loss goes on in the next line."""


def styles_of(losses: Iterable[str]) -> Mapping[str, dict[str, Any]]:
    """Colour, dashes and label of each loss of one figure; up to as many as there are colours differ in colour."""
    losses = list(losses)
    others = [colour for colour in COLOURS if colour not in {_KNOWN.get(loss) for loss in losses}]
    free = cycle(others or COLOURS)
    dashes = cycle(("--", "-.", ":"))
    return {
        loss: {
            "color": _KNOWN[loss] if loss in _KNOWN else next(free),
            "linestyle": "-" if loss in _KNOWN else next(dashes),
            "label": textwrap.fill(loss_title(loss), _LEGEND_WIDTH),
        }
        for loss in losses
    }


def new_figure(height: float, *, title: str) -> Figure:
    """An empty figure as wide as a column of the paper, 3.5 inches.

    Args:
        height: in inches.
        title: above the figure.
    """
    figure = Figure(figsize=(3.5, height), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=7)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file, the same bytes for the same figure."""
    # A palette makes the file a quarter as large, and the eye does not see it.
    canvas: Any = figure.canvas
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True, dpi=(figure.dpi, figure.dpi))


def label_axes(axes: Any, title: str, x: str, y: str) -> None:
    """Title, axis labels and the plain look of all figures."""
    axes.set_title(title, fontsize=7, loc="left")
    axes.set_xlabel(x, fontsize=6)
    axes.set_ylabel(y, fontsize=6)
    axes.tick_params(labelsize=6, width=0.6, length=2)
    axes.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Figure) -> None:
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


def panels(titles: Sequence[str], styles: Mapping[str, Mapping[str, Any]], title: str) -> tuple[Figure, list[Any]]:
    """A figure with one panel for each title, two in a row, and room for the legend of the styles.

    Returns:
        The figure, and the axes of each panel.
    """
    columns = min(2, len(titles))
    rows = -(-len(titles) // columns)
    legend_lines = sum(style["label"].count("\n") + 1 for style in styles.values()) / 2
    figure = new_figure(0.5 + 1.6 * rows + 0.12 * legend_lines, title=title)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in every[len(titles) :]:
        unused.remove()
    return figure, every[: len(titles)]


def draw_curve(axes: Any, x: Any, mean: Any, low: Any, high: Any, style: Mapping[str, Any]) -> None:
    """Shares in % along x, with their intervals as a band; NaN ends have no band."""
    axes.plot(x, 100.0 * mean, marker="o", markersize=2, linewidth=1.2, **style)
    axes.fill_between(x, 100.0 * low, 100.0 * high, color=style["color"], alpha=0.12, linewidth=0)
