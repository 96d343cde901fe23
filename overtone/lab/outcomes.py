"""The lines of a benchmark's results.jsonl: one scored edit each, after a first line that says what was run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overtone.lab.metrics import Scores
from overtone.lab.records import read_records, read_scores_and_trace
from overtone.lab.traces import EditTrace

FORMAT = "overtone bench 1"
"""What the first line of a results file calls itself."""

SequenceKey = tuple[str, int, str, str, int, int]
"""Data, seed, method, loss, length and number of a sequence of edits."""


@dataclass(frozen=True)
class EditOutcome:
    """One edit of a sequence, scored after the sequence's last edit; a single edit is a sequence of one.

    Attributes:
        data: name of the corpus.
        seed: of the corpus, its model and the choice of edits.
        method: a name that `overtone.lab.sessions.open_session` takes.
        loss: canonical spec (see `overtone.lab.losses`).
        length: edits in the sequence.
        sequence: which of the sequences of this length.
        position: 0-based place in the sequence; `length - 1 - position` edits were made after this one.
        index: of the edit in the corpus' list.
        prompt: the edited prompt.
        target_new: what it shall say.
        target_old: what it said.
        scores: how good the edit is; None if the sequence failed.
        answers: shares of its questions answered, by measure; empty where the corpus has no questions.
        perplexity: of the edited model on held-out texts after the sequence's last edit; None if the sequence failed or
            it is not finite.
        steps: optimiser steps that this edit took.
        ended: why it took no more (see `overtone.lab.editors.FitTrace`); "failed" if the sequence failed.
        seconds: wall-clock time of the edit's steps.
        trace: what happened step by step, where it was watched.
        error: what went wrong, "TypeError: ..."; None if nothing did.
    """

    data: str
    seed: int
    method: str
    loss: str
    length: int
    sequence: int
    position: int
    index: int
    prompt: str
    target_new: str
    target_old: str
    scores: Scores | None = None
    answers: dict[str, float] = field(default_factory=dict)
    perplexity: float | None = None
    steps: int = 0
    ended: str = "failed"
    seconds: float = 0.0
    trace: EditTrace | None = None
    error: str | None = None

    @property
    def sequence_key(self) -> SequenceKey:
        """The sequence that the edit belongs to."""
        return self.data, self.seed, self.method, self.loss, self.length, self.sequence

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes the outcome one of its file."""
        return *self.sequence_key, self.position

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EditOutcome:
        """The outcome that `dataclasses.asdict` took apart."""
        return cls(**read_scores_and_trace(values))


def whole_sequences(outcomes: Iterable[EditOutcome]) -> dict[SequenceKey, list[EditOutcome]]:
    """The outcomes of the sequences of which no edit is missing, in order of position, each edit once."""
    sequences: dict[SequenceKey, dict[int, EditOutcome]] = {}
    for outcome in outcomes:
        sequences.setdefault(outcome.sequence_key, {})[outcome.position] = outcome
    return {
        key: [edits[position] for position in sorted(edits)]
        for key, edits in sequences.items()
        if len(edits) == next(iter(edits.values())).length
    }


def commands(header: Mapping[str, Any]) -> list[list[str]]:
    """The command lines that made a results file, in order; files from before there could be several name one."""
    one = [header["command"]] if "command" in header else []
    return [list(command) for command in header.get("commands", one)]


def read_results(path: Path) -> tuple[dict[str, Any], list[EditOutcome]]:
    """The first line of a results file and its outcomes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a results file.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no results file {str(path)!r}")
    header, outcomes = read_records(path, EditOutcome)
    if header is None or header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a results file of this version of overtone ({FORMAT})")
    return header, outcomes
