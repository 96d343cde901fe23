"""A sequence of edits on one model, scored after the last: what a run repeats for every method and loss."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from overtone.lab.data.edit import Edit
from overtone.lab.edit.fit import FitTrace
from overtone.lab.edit.methods import METHODS, MethodSettings
from overtone.lab.edit.sessions import Session, WeightSession, open_session
from overtone.lab.model.workplace import Workplace
from overtone.lab.results.record import EditRecord, SequenceKey, settings_text
from overtone.lab.score.perplexity import perplexity
from overtone.lab.score.questions import ask
from overtone.lab.score.scores import Examination, Scores, examine, score
from overtone.lab.score.traces import Tracer
from overtone.token_loss import parse

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SequenceTask:
    """Edits to make in a row and to score after the last; a single edit is a sequence of one.

    Attributes:
        data: name of the corpus.
        seed: of the corpus and its model.
        method: a name that `overtone.lab.edit.sessions.open_session` takes.
        settings: of the method; None where EasyEdit's files decide.
        loss: canonical spec (see `overtone.token_loss`).
        sequence: which of the sequences of its length.
        edits: the edits, in order; the corpus' list from `first_index` on.
        held_out_texts: for the perplexity of the edited model.
        known_texts: what the model knows, for methods that need it.
        is_traced: watch the probes of a single edit at every step.
    """

    data: str
    seed: int
    method: str
    settings: MethodSettings | None
    loss: str
    sequence: int
    edits: tuple[Edit, ...] = field(repr=False)
    held_out_texts: tuple[str, ...] = field(repr=False)
    known_texts: tuple[str, ...] = field(default=(), repr=False)
    is_traced: bool = False

    @property
    def length(self) -> int:
        """T: how many edits."""
        return len(self.edits)

    @property
    def first_index(self) -> int:
        """The place of the first edit in the corpus' list; it also seeds the method's random initial weights."""
        return self.sequence * self.length

    @property
    def key(self) -> SequenceKey:
        """The key of the records that the task makes."""
        settings = settings_text(self._settings)
        return SequenceKey(self.data, self.seed, self.method, settings, self.loss, self.length, self.sequence)

    @property
    def _settings(self) -> dict[str, Any]:
        return {} if self.settings is None else self.settings.as_dict()

    def perform(self, workplace: Workplace) -> list[EditRecord]:
        """Make and score the edits; if one fails, the records of all of them say so.

        The model is compared with the clean one at the end, which is before the next sequence.

        Raises:
            NotRestoredError: it is not what it was, bit for bit: the run must end.
            OSError, MemoryError, torch.OutOfMemoryError: of the machine, not of the edit, which may do another time.
        """
        try:
            records = self._perform(workplace)
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        # Whatever an edit fails of, the others can still be made, once the model is known to be as before.
        except Exception as error:
            logger.warning("%s failed: %s", self.key, error)
            records = self.failed(error)
        workplace.require_restored(self.method)
        return records

    def _perform(self, workplace: Workplace) -> list[EditRecord]:
        examinations = _examine_all(workplace, self.edits)
        tracer = Tracer(workplace.model, workplace.tokenizer, self.edits[0]) if self.is_traced else None
        with open_session(workplace, self.method, self.settings, self.first_index, self.known_texts) as session:
            observe = None if tracer is None else tracer.observe
            fitted = self._fit(session, observe)
            if tracer is not None:
                tracer.record(fitted[-1].steps)
            is_own = self.method in METHODS  # and so changes weights alone
            scores = [
                with_finite_kl(score(session.model, workplace.tokenizer, examination, in_one_pass=is_own))
                for examination in examinations
            ]
            answers = [
                ask(session.model, workplace.tokenizer, edit, self.seed) if edit.questions else {}
                for edit in self.edits
            ]
            after = perplexity(session.model, workplace.tokenizer, self.held_out_texts) if self.held_out_texts else None
        trace = None if tracer is None else tracer.trace
        # A results file cannot hold NaN or infinity, and no mean could be taken over them.
        json.dumps([*map(asdict, scores), answers, None if trace is None else asdict(trace)], allow_nan=False)
        return [
            self.record(
                position,
                scores=scores[position],
                answers=answers[position],
                perplexity=None if after is None or not math.isfinite(after) else after,
                steps=fit.steps,
                ended=fit.ended,
                seconds=fit.seconds,
                trace=trace,
            )
            for position, fit in enumerate(fitted)
        ]

    def _fit(self, session: Session, observe: Callable[[int], None] | None) -> list[FitTrace]:
        loss = parse(self.loss)
        edits_a_step = None if self.settings is None else self.settings.breadth_first
        if edits_a_step is None:
            return [session.apply(edit, loss, observe) for edit in self.edits]
        assert isinstance(session, WeightSession)
        return session.apply_in_rounds(self.edits, loss, edits_a_step=edits_a_step, seed=self.first_index)

    def failed(self, error: Exception) -> list[EditRecord]:
        """The records that say why no edit of the sequence counts."""
        return [self.record(position, error=f"{type(error).__name__}: {error}") for position in range(self.length)]

    def record(self, position: int, **values: Any) -> EditRecord:
        """The record of one of the edits, with these fields beside those that the task knows."""
        edit = self.edits[position]
        return EditRecord(
            data=self.data,
            seed=self.seed,
            method=self.method,
            settings=self._settings,
            loss=self.loss,
            length=self.length,
            sequence=self.sequence,
            position=position,
            index=self.first_index + position,
            prompt=edit.prompt,
            target_new=edit.target_new,
            target_old=edit.target_old,
            **values,
        )


def with_finite_kl(scores: Scores) -> Scores:
    """The scores as a results file can hold them."""
    return scores if scores.kl is None or math.isfinite(scores.kl) else replace(scores, kl=None)


@lru_cache(maxsize=1)
def _examine_all(workplace: Workplace, edits: tuple[Edit, ...]) -> list[Examination]:
    """Kept for the next task: the losses of the same edits come one after the other."""
    return [examine(workplace.model, workplace.tokenizer, edit) for edit in edits]
