"""How far a run is, on the terminal's standard error, with the time that is left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from overtone.lab.run.run import Run


def perform_with_progress(run: Run) -> None:
    """Make the edits that are left; the first rank then waits for the others."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False)
    is_first = run.shard.rank == 0
    console = Console(stderr=True)
    with Progress(*columns, *left, console=console, transient=True, disable=not is_first) as progress:
        bar = progress.add_task("editing", total=sum(task.length for task in run.left()))
        for edits in run.perform():
            progress.advance(bar, edits)
        if is_first and not run.shard.is_alone:
            bar = progress.add_task("waiting for the other ranks", total=run.plan.edits)
            for finished in run.wait_for_others():
                progress.update(bar, completed=finished)
