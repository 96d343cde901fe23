"""How far a run is, on standard error, with the time that is left: a bar on a terminal, some lines elsewhere."""

from __future__ import annotations

from datetime import timedelta

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from overtone.lab.log_lines import LogLines
from overtone.lab.run.run import Run


def perform_with_progress(run: Run) -> None:
    """Make the edits that are left; the first rank then waits for the others."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False)
    is_first = run.shard.rank == 0
    lines = LogLines()
    with Progress(*columns, *left, console=lines.console, transient=True, disable=not is_first) as progress:
        bar = progress.add_task("editing", total=sum(task.length for task in run.left()))
        for edits in run.perform():
            progress.advance(bar, edits)
            if is_first:
                lines.tell(lambda: _line(progress.tasks[bar]))
        if is_first and not run.shard.is_alone:
            bar = progress.add_task("waiting for the other ranks", total=run.plan.edits)
            for finished in run.wait_for_others():
                progress.update(bar, completed=finished)


def _line(task: Task) -> str:
    assert task.total is not None
    assert task.elapsed is not None
    # Over the whole run: edits that share a pass end together, and the pace of the last seconds says nothing.
    left = timedelta(seconds=round(task.elapsed / task.completed * (task.total - task.completed)))
    return f"{task.completed:.0f} of the {task.total:.0f} edits left to make are made, about {left} to go"
