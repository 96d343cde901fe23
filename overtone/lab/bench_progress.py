"""How far a benchmark is, on the terminal's standard error, with the time that is left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from overtone.lab.bench import Bench
from overtone.lab.results_folder import ResultsFolder


def show_progress(bench: Bench, results: ResultsFolder) -> None:
    """Make the edits that are left; the first rank then waits for the others.

    Args:
        bench: the run.
        results: its output folder.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False)
    console = Console(stderr=True)
    is_first = bench.shard.rank == 0
    with Progress(*columns, *left, console=console, transient=True, disable=not is_first) as progress:
        bar = progress.add_task("editing", total=sum(task.length for task in bench.left(results)))
        for outcomes in bench.perform(results):
            progress.advance(bar, len(outcomes))
        if is_first and not bench.shard.is_alone:
            bar = progress.add_task("waiting for the other ranks", total=bench.edits_planned)
            for done in bench.wait_for_others(results):
                progress.update(bar, completed=done)
