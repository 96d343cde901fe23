"""A results file as reports read it: the edits of whole sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overtone.lab.outcomes import EditOutcome, read_results, whole_sequences


@dataclass(frozen=True)
class Results:
    """What a results file holds.

    Attributes:
        header: its first line.
        outcomes: the edits of whole sequences, failed ones too.
        unfinished: edits of sequences that are not whole; they count nowhere.
    """

    header: dict[str, Any]
    outcomes: list[EditOutcome]
    unfinished: int


def load_results(path: Path) -> Results:
    """Read a results file; an incomplete last line, which a killed run leaves, is passed over.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a results file, or has no finished edit.
    """
    header, edits = read_results(path)
    outcomes = [outcome for sequence in whole_sequences(edits).values() for outcome in sequence]
    if not outcomes:
        raise ValueError(f"{path} has no finished edit: there is nothing to report")
    return Results(header, outcomes, len({outcome.key for outcome in edits}) - len(outcomes))
