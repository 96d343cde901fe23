"""The table of an experiment, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from overtone.lab.editors import METHODS
from overtone.lab.losses import LOSSES
from overtone.lab.summary import Estimate, SummaryRow


@dataclass(frozen=True)
class _Column:
    heading: str
    factor: float = 100.0
    mean_decimals: int = 1
    interval_decimals: int | None = 0

    def cell(self, estimate: Estimate | None) -> str:
        if estimate is None:
            return "-"
        mean = f"{self.factor * estimate.mean:.{self.mean_decimals}f}"
        if self.interval_decimals is None or estimate.low is None or estimate.high is None:
            return mean
        low, high = (f"{self.factor * end:.{self.interval_decimals}f}" for end in (estimate.low, estimate.high))
        return f"{mean}\n[dim]{low}-{high}[/dim]"


_COLUMNS = {
    "rel": _Column("Rel"),
    "gen": _Column("Gen"),
    "por": _Column("Por"),
    "loc": _Column("Loc"),
    "average": _Column("Avg"),
    "exact_match_average": _Column("Exact\nmatch"),
    "kl": _Column("KL", factor=1.0, mean_decimals=3, interval_decimals=2),
    "steps": _Column("Steps", factor=1.0, interval_decimals=None),
}


def table(rows: Sequence[SummaryRow], *, title: str) -> Table:
    """A table with the mean of every measure and, under it, the 95% interval.

    Args:
        rows: from `overtone.lab.summary.summarise`.
        title: above the table.
    """
    result = Table(
        title=title,
        caption=_caption(rows),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    result.add_column("Loss")
    for column in _COLUMNS.values():
        result.add_column(column.heading, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if row.method != previous:
            result.add_section()
            result.add_row(f"[bold]{METHODS[row.method].title}[/bold]")
            previous = row.method
        cells = [column.cell(row.measures.get(name)) for name, column in _COLUMNS.items()]
        result.add_row(LOSSES[row.loss].title, *cells)
    return result


def _caption(rows: Sequence[SummaryRow]) -> str:
    methods = [METHODS[name] for name in dict.fromkeys(row.method for row in rows)]
    optimisers = ", ".join(f"{method.title} {method.steps} steps at lr {method.lr:g}" for method in methods)
    return (
        "Mean over single edits and its 95% bootstrap interval. Rel, Gen, Por, Loc: teacher-forced token accuracy "
        "in %, Avg: their mean; Exact match: greedy generation, mean of the same four; KL: from the unedited model "
        f"on locality probes, in nats. Adam for every loss alike: {optimisers}."
    )
