"""The tables of a bench in Markdown, with the paper's own rows under those that it has too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from overtone.lab.bench_overall import EVERY_THRESHOLD, ONE_THRESHOLD, Overall
from overtone.lab.bench_tables import (
    AVERAGE,
    BEST_BASELINE,
    BEST_STOP,
    Block,
    Row,
    counts_old_answers,
    is_early_stopping,
    is_sampled,
)
from overtone.lab.paper import PaperRow
from overtone.lab.summary import Estimate
from overtone.lab.titles import data_title, length_title, loss_title, method_title


@dataclass(frozen=True)
class Column:
    """How a measure is written.

    Attributes:
        heading: of the column.
        factor: what the values are multiplied by; 100 for a share that is written in %.
        decimals: of the mean.
        interval_decimals: of the interval's ends; None: it is not written.
    """

    heading: str
    factor: float = 100.0
    decimals: int = 1
    interval_decimals: int | None = 0


EDITING_COLUMNS: Mapping[str, Column] = {
    "rel": Column("Rel"),
    "gen": Column("Gen"),
    "por": Column("Por"),
    "loc": Column("Loc"),
    AVERAGE: Column("Average", interval_decimals=1),
    "perplexity": Column("Perplexity", factor=1.0, decimals=2, interval_decimals=None),
    "steps": Column("Steps", factor=1.0, interval_decimals=None),
}


def overall_tables(tables: Sequence[Overall]) -> Iterator[str]:
    """Lines: a table per method and scope."""
    for table in tables:
        cells = "; ".join(
            f"{data_title(data)}, {length_title(length)} ({loss_title(threshold)})"
            for (data, length), threshold in zip(table.cells, table.thresholds, strict=True)
        )
        yield (
            f"**{method_title(table.method)}, {table.scope}** ({table.units} groups of edits resampled; best single "
            f"threshold: {loss_title(table.one_threshold)}). Columns, with the best threshold of each: {cells}."
        )
        yield ""
        yield markdown_line(
            ["Loss", "Average", *(f"Difference to {rival}" for rival in (ONE_THRESHOLD, EVERY_THRESHOLD))]
        )
        yield markdown_line(["---", "---:", "---:", "---:"])
        for row in sorted(table.rows, key=lambda row: -row.average):
            differences = (
                difference(row.differences[rival], is_clear=table.is_clear(row.differences[rival]))
                if rival in row.differences
                else "reference"
                for rival in (ONE_THRESHOLD, EVERY_THRESHOLD)
            )
            yield markdown_line([loss_title(row.loss), f"{100 * row.average:.1f}", *differences])
        yield ""


def question_columns(blocks: Sequence[Block]) -> dict[str, Column]:
    """The columns of Table 2: those of the questions that were asked, in their order."""
    measures = dict.fromkeys(name for block in blocks for row in block.rows for name in row.measures)
    columns = {}
    for name in measures:
        heading = name[:1].upper() + name[1:]
        if name == AVERAGE:
            columns[name] = Column(heading, interval_decimals=1)
        else:
            columns[name] = Column(heading, interval_decimals=None if counts_old_answers(name) else 0)
    return columns


def tables_by_data(
    blocks: Sequence[Block],
    columns: Mapping[str, Column],
    paper_rows: Callable[[Block, str], Sequence[PaperRow]],
) -> Iterator[str]:
    """Lines: a heading per data and length, and under it a table per method.

    Args:
        blocks: of one kind of table.
        columns: the measures to show; one that a block does not have is left out there.
        paper_rows: the paper's rows for a block and a loss.
    """
    data, length = None, None
    for block in blocks:
        if block.data != data:
            yield from (f"### {data_title(block.data)}", "")
        if (block.data, block.length) != (data, length):
            yield from (f"#### {data_title(block.data)}: {length_title(block.length)}", "")
        data, length = block.data, block.length
        yield from (_about(block), "")
        shown = {name: column for name, column in columns.items() if any(name in row.measures for row in block.rows)}
        heading = ["Loss", *(column.heading for column in shown.values())]
        heading += [f"Difference to {rival}" for rival in block.rivals]
        yield markdown_line([*heading, "Edits"])
        yield markdown_line(["---", *["---:"] * len(heading)])
        for row in block.rows:
            yield markdown_line(_cells(row, block, shown))
            for paper_row in paper_rows(block, row.loss):
                yield markdown_line(_paper_cells(paper_row, block, shown))
        yield ""


def interval(estimate: Estimate, column: Column) -> str:
    """A mean with its interval behind it."""
    mean = f"{column.factor * estimate.mean:.{column.decimals}f}"
    if column.interval_decimals is None or estimate.low is None or estimate.high is None:
        return mean
    low, high = (f"{column.factor * end:.{column.interval_decimals}f}" for end in (estimate.low, estimate.high))
    return f"{mean} ({low} to {high})"


def difference(estimate: Estimate, *, is_clear: bool) -> str:
    """A difference in points with its interval; bold if it is clear."""
    text = signed(estimate.mean)
    if estimate.low is not None and estimate.high is not None:
        text = f"{text} ({signed(estimate.low)} to {signed(estimate.high)})"
    return f"**{text}**" if is_clear else text


def signed(share: float) -> str:
    """A difference of shares in points, with as many decimals as tell it from 0."""
    points = 100.0 * share
    return f"{points:+.1f}" if abs(points) >= 0.05 or abs(points) < 1e-9 else f"{points:+.1g}"


def _about(block: Block) -> str:
    seeds = f"{block.seeds} seed{'s' if block.seeds > 1 else ''}"
    parts = [f"{block.units} {block.unit} of {seeds} resampled" if block.units > 1 else f"one edit of {seeds}"]
    if BEST_BASELINE in block.rivals:
        parts.append(f"best baseline: {loss_title(block.rivals[BEST_BASELINE])}")
    if BEST_STOP in block.rivals:
        tried = sum(is_early_stopping(row.loss) for row in block.rows)
        of_how_many = f"the best of {tried} thresholds" if tried > 1 else "the only threshold here"
        parts.append(f"best early stopping: {loss_title(block.rivals[BEST_STOP])}, {of_how_many}")
    if not block.has_enough_units:
        parts.append("too few independent edits or sequences for intervals to be trusted, so nothing is bold")
    return f"**{method_title(block.method)}** ({'; '.join(parts)})"


def _cells(row: Row, block: Block, columns: Mapping[str, Column]) -> list[str]:
    cells = [loss_title(row.loss)]
    cells += [interval(row.measures[name], columns[name]) if name in row.measures else "-" for name in columns]
    for title, rival in block.rivals.items():
        if row.loss == rival:
            cells.append("reference")
        elif title in row.differences:
            cells.append(difference(row.differences[title], is_clear=block.is_clear(row.differences[title])))
        else:
            cells.append("-")
    failed = f" ({row.failed} failed)" if row.failed else ""
    return [*cells, f"{row.scored}{failed}"]


def _paper_cells(row: PaperRow, block: Block, columns: Mapping[str, Column]) -> list[str]:
    values = paper_values(row, list(columns))
    cells = [f"*{values[name]:.2f}*" if name in values else "" for name in columns]
    # The paper rounds its own averages; anything larger is a misprint there.
    is_misprinted = abs(row.mean - row.values["average"]) > 0.02
    note = f", average as printed; its columns' mean is {row.mean:.2f}" if is_misprinted else ""
    return [f"*paper, {row.source}{note}*", *cells, *[""] * len(block.rivals), ""]


def paper_values(row: PaperRow, measures: Sequence[str]) -> dict[str, float]:
    """The paper's numbers by the bench's measures: its answers were sampled at temperature 0.1."""
    found = {}
    for measure in measures:
        kind = measure.partition(",")[0]
        if measure in row.values:
            found[measure] = row.values[measure]
        elif kind in row.values and is_sampled(measure) and not counts_old_answers(measure):
            found[measure] = row.values[kind]
    return found


def markdown_line(cells: Sequence[str]) -> str:
    """One line of a table; what would break it is replaced."""
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"
