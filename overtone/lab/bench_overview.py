"""A bench at a glance, for a terminal of 80 columns."""

from __future__ import annotations

from rich import box
from rich.table import Table

from overtone.lab.bench_markdown import signed
from overtone.lab.bench_results import Results
from overtone.lab.bench_tables import AVERAGE, BEST_BASELINE, Block, Row, editing_blocks
from overtone.lab.titles import data_title, loss_title, method_title


def overview(results: Results) -> Table:
    """A line per data, method and loss: for each T the average and its difference to the best baseline.

    Args:
        results: from `overtone.lab.bench_results.load_results`.
    """
    blocks = {(block.data, block.method, block.length): block for block in editing_blocks(results.outcomes)}
    lengths = sorted({length for _, _, length in blocks})
    table = Table(
        title="Average in %, and difference to the best baseline",
        caption="bold: the 95% interval of the difference excludes 0 and can be trusted; =: the best baseline itself",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("Loss")
    for length in lengths:
        table.add_column(f"T = {length}", justify="right", no_wrap=True)
        table.add_column("diff", justify="right", no_wrap=True)
    for data, method in dict.fromkeys((data, method) for data, method, _ in blocks):
        at = {length: blocks[data, method, length] for length in lengths if (data, method, length) in blocks}
        table.add_section()
        table.add_row(f"[bold]{data_title(data)}, {method_title(method)}[/bold]")
        for loss in dict.fromkeys(row.loss for block in at.values() for row in block.rows):
            cells = [cell for length in lengths for cell in _cells(at.get(length), loss)]
            table.add_row(loss_title(loss), *cells)
    return table


def _cells(block: Block | None, loss: str) -> tuple[str, str]:
    row: Row | None = next((row for row in block.rows if row.loss == loss), None) if block else None
    if block is None or row is None:
        return "", ""
    if AVERAGE not in row.measures:
        return "failed", ""
    average = f"{100.0 * row.measures[AVERAGE].mean:.1f}"
    if block.rivals.get(BEST_BASELINE) == loss:
        return average, "="
    if BEST_BASELINE not in row.differences:
        return average, ""
    difference = row.differences[BEST_BASELINE]
    text = signed(difference.mean)
    return average, f"[bold]{text}[/bold]" if block.is_clear(difference) else text
