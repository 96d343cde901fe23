"""The tables of a bench as CSV, in full precision: a line per loss, and one per row of the paper beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from overtone.lab.bench_figures import ForgettingPoint
from overtone.lab.bench_overall import EVERY_THRESHOLD, ONE_THRESHOLD, Overall
from overtone.lab.bench_tables import Block
from overtone.lab.paper import PaperRow
from overtone.lab.summary import Estimate


def table_csv(blocks: Sequence[Block], paper_rows: Callable[[Block, str], Sequence[PaperRow]]) -> str:
    """A table's blocks.

    Shares and their differences are fractions of 1, the paper's too. `clear` says whether the report sets the
    difference in bold.

    Args:
        blocks: of one kind of table.
        paper_rows: the paper's rows for a block and a loss.
    """
    lines: list[dict[str, Any]] = []
    for block in blocks:
        for row in block.rows:
            where = {"data": block.data, "length": block.length, "method": block.method, "loss": row.loss}
            line = {**where, "source": "this file", "seeds": block.seeds, "edits": row.scored, "failed": row.failed}
            line |= {"resampled": block.unit, "units": block.units}
            for name, estimate in row.measures.items():
                line |= _numbers(name, estimate)
            for title, rival in block.rivals.items():
                line[title] = rival
                if title in row.differences:
                    line |= _numbers(f"difference to {title}", row.differences[title])
                    line[f"difference to {title} clear"] = block.is_clear(row.differences[title])
            lines.append(line)
            for paper_row in paper_rows(block, row.loss):
                values = {name: round(value / 100.0, 6) for name, value in paper_row.values.items()}
                lines.append({**where, "source": f"paper, {paper_row.source}", **values})
    return _csv(lines)


def overall_csv(tables: Iterable[Overall]) -> str:
    """Each loss over all data and lengths of a method."""
    lines: list[dict[str, Any]] = []
    for table in tables:
        columns = "; ".join(f"{data} T={length}" for data, length in table.cells)
        for row in table.rows:
            line: dict[str, Any] = {"method": table.method, "scope": table.scope, "columns": columns, "loss": row.loss}
            line |= {"average": row.average, ONE_THRESHOLD: table.one_threshold}
            line |= {EVERY_THRESHOLD: "; ".join(table.thresholds), "units": table.units}
            for title, found in row.differences.items():
                line |= _numbers(f"difference to {title}", found)
                line[f"difference to {title} clear"] = table.is_clear(found)
            lines.append(line)
    return _csv(lines)


def forgetting_csv(points: Iterable[ForgettingPoint]) -> str:
    """Reliability by how many edits were made since."""
    return _csv(
        [
            {
                "data": point.data,
                "length": point.length,
                "method": point.method,
                "loss": point.loss,
                "youngest": point.youngest,
                "oldest": point.oldest,
                **_numbers("rel", point.rel),
                "edits": point.rel.count,
            }
            for point in points
        ]
    )


def _numbers(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.mean, f"{name} low": estimate.low, f"{name} high": estimate.high}


def _csv(lines: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for line in lines for column in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
