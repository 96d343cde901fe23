"""One scored edit, as results have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from overtone.lab.score.scores import Scores
from overtone.lab.score.traces import EditTrace


class SequenceKey(NamedTuple):
    """What makes a sequence of edits one of its run."""

    data: str
    seed: int
    method: str
    settings: str
    loss: str
    length: int
    sequence: int


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings in one line, such as "lr=0.005, steps=50"."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


@dataclass(frozen=True)
class EditRecord:
    """One edit of a sequence, scored after the sequence's last edit; a single edit is a sequence of one.

    Attributes:
        data: name of the corpus.
        seed: of the corpus, its model and the choice of edits.
        method: name of the editing method.
        settings: of its optimiser and weights (`overtone.lab.edit.methods.MethodSettings`) but for those that are not
            set; empty where EasyEdit's files decide.
        loss: canonical spec of the loss.
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
        ended: why it took no more (see `overtone.lab.edit.fit.FitTrace`); "failed" if the sequence failed.
        seconds: wall-clock time of the edit's steps.
        trace: what happened step by step, where it was watched.
        error: what went wrong, "TypeError: ..."; None if nothing did.
    """

    data: str
    seed: int
    method: str
    settings: dict[str, Any]
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
    def key(self) -> SequenceKey:
        """The sequence that the edit belongs to."""
        settings = settings_text(self.settings)
        return SequenceKey(self.data, self.seed, self.method, settings, self.loss, self.length, self.sequence)

    def as_json(self) -> dict[str, Any]:
        """The record as JSON has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EditRecord:
        """The record that `as_json` took apart."""
        scores, trace = values.get("scores"), values.get("trace")
        return cls(
            **{
                **values,
                "scores": None if scores is None else Scores(**scores),
                "trace": None if trace is None else EditTrace(**trace),
            }
        )
