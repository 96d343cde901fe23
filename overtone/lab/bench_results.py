"""A results file as reports read it: the edits of whole sequences."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from overtone.lab.losses import parse_loss
from overtone.lab.outcomes import EditOutcome, read_results, whole_sequences
from overtone.lab.registry import look_up


@dataclass(frozen=True)
class Results:
    """What a results file holds.

    Attributes:
        header: its first line.
        outcomes: the edits of whole sequences, failed ones too.
        unfinished: edits of sequences that are not whole; they count nowhere.
        left_out: losses and seeds of the file that were not asked for.
    """

    header: dict[str, Any]
    outcomes: list[EditOutcome]
    unfinished: int
    left_out: tuple[str, ...] = ()


def load_results(path: Path, *, losses: Collection[str] = (), seeds: Collection[int] = ()) -> Results:
    """Read a results file; an incomplete last line, which a killed run leaves, is passed over.

    Args:
        path: results.jsonl.
        losses: specs of those to read; none for all.
        seeds: those to read; none for all.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a results file, has no finished edit, or lacks a loss or seed that is asked for.
    """
    header, edits = read_results(path)
    of_losses = _chosen("loss", (edit.loss for edit in edits), [parse_loss(spec).name for spec in losses])
    of_seeds = _chosen("seed", (edit.seed for edit in edits), seeds)
    left_out = [f"{kind} {name}" for kind, found in (("loss", of_losses), ("seed", of_seeds)) for name in found.others]
    edits = [edit for edit in edits if edit.loss in of_losses.names and edit.seed in of_seeds.names]
    outcomes = [outcome for sequence in whole_sequences(edits).values() for outcome in sequence]
    if not outcomes:
        raise ValueError(f"{path} has no finished edit: there is nothing to report")
    return Results(header, outcomes, len({outcome.key for outcome in edits}) - len(outcomes), tuple(left_out))


class _Chosen(NamedTuple):
    names: set[Any]
    others: list[Any]


def _chosen(kind: str, found: Iterable[Any], asked_for: Collection[Any]) -> _Chosen:
    """What is asked for of what is there, or all of it, and the rest."""
    registry = {str(name): name for name in found}
    names = set(look_up(registry, kind, map(str, asked_for))) if asked_for else set(registry.values())
    return _Chosen(names, [name for name in registry.values() if name not in names])
