"""How far a run is, on standard error, with the time that is left: a bar on a terminal, some lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from overtone.lab.run.run import Run

SECONDS_A_LINE = 30.0
"""How often a log, in which no bar can move, gets a line at most; edits that share a pass count together."""


def perform_with_progress(run: Run) -> None:
    """Make the edits that are left; the first rank then waits for the others."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False)
    is_first = run.shard.rank == 0
    console = Console(stderr=True)
    has_bar = sys.stderr.isatty() and not console.is_dumb_terminal
    with Progress(*columns, *left, console=console, transient=True, disable=not is_first) as progress:
        bar = progress.add_task("editing", total=sum(task.length for task in run.left()))
        told = time.monotonic()
        for edits in run.perform():
            progress.advance(bar, edits)
            if is_first and not has_bar and time.monotonic() - told >= SECONDS_A_LINE:
                told = time.monotonic()
                console.print(_line(progress.tasks[bar]), highlight=False)
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
