"""A sequence of edits on one model, scored after the last: what the benchmark repeats for every method and loss."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from overtone.lab.checkpoint import SequenceCheckpoint
from overtone.lab.editors import METHODS
from overtone.lab.experiment import Workplace
from overtone.lab.losses import parse_loss
from overtone.lab.metrics import Scores, score
from overtone.lab.outcomes import EditOutcome, SequenceKey
from overtone.lab.perplexity import perplexity
from overtone.lab.questions import ask
from overtone.lab.sessions import easyedit_version, open_session
from overtone.lab.traces import Tracer
from overtone.lab.world import Edit

logger = logging.getLogger(__name__)


def library_versions() -> dict[str, str]:
    """Of the libraries that outcomes depend on."""
    return {name: version(name) for name in ("overtone", "torch", "transformers", "peft")}


@dataclass(frozen=True)
class SequenceTask:
    """Edits to make one after the other and to score after the last; a single edit is a sequence of one.

    Attributes:
        data: name of the corpus.
        seed: of the corpus and its model.
        method: a name that `overtone.lab.sessions.open_session` takes.
        loss: canonical spec (see `overtone.lab.losses`).
        sequence: which of the sequences of its length.
        edits: the edits, in order; the corpus' list from `first_index` on.
        held_out_texts: for the perplexity of the edited model.
        known_texts: what the model knows, for methods that need it.
        checkpoints: folder for the states of sequences under way, so that a killed run goes on inside the sequence;
            None keeps none.
        is_traced: watch the probes of a single edit at every step.
    """

    data: str
    seed: int
    method: str
    loss: str
    sequence: int
    edits: tuple[Edit, ...] = field(repr=False)
    held_out_texts: tuple[str, ...] = field(repr=False)
    known_texts: tuple[str, ...] = field(default=(), repr=False)
    checkpoints: Path | None = None
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
        """The sequence key of the outcomes that the task makes."""
        return self.data, self.seed, self.method, self.loss, self.length, self.sequence

    def perform(self, workplace: Workplace) -> list[EditOutcome]:
        """Make and score the edits; if one fails, the outcomes of all of them say so.

        The model is compared with the clean one at the end, which is before the next sequence.

        Raises:
            NotRestoredError: it is not what it was, bit for bit: the run must end.
            OSError, MemoryError, torch.OutOfMemoryError: of the machine, not of the edit, which may do another time.
        """
        try:
            outcomes = self._perform(workplace)
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        # Whatever an edit fails of, the others can still be made, once the model is known to be as before.
        except Exception as error:
            logger.warning("%s failed: %s", self.key, error)
            outcomes = [self._failed(position, error) for position in range(self.length)]
        workplace.require_restored(self.method)
        return outcomes

    def _checkpoint(self, fingerprint: str) -> SequenceCheckpoint:
        # A single edit is over before its state would be of use.
        kept = self.checkpoints if self.length > 1 else None
        of = json.dumps([fingerprint, [asdict(edit) for edit in self.edits], self._made_by()])
        return SequenceCheckpoint(
            None if kept is None else checkpoint_path(kept, self.key), hashlib.sha256(of.encode()).hexdigest()
        )

    def _made_by(self) -> list[Any]:
        """The optimiser's settings, which are EasyEdit's own for its methods, and the versions."""
        method = METHODS.get(self.method)
        how = easyedit_version() if method is None else [method.steps, method.lr]
        return [how, library_versions()]

    def _perform(self, workplace: Workplace) -> list[EditOutcome]:
        loss = parse_loss(self.loss)
        examinations = workplace.examine(self.edits)
        tracer = Tracer(workplace.model, workplace.tokenizer, self.edits[0]) if self.is_traced else None
        checkpoint = self._checkpoint(workplace.fingerprint)
        with open_session(workplace, self.method, self.first_index, self.known_texts) as session:
            fitted = checkpoint.resume(session, self.edits[0], loss)
            for edit in self.edits[len(fitted) :]:
                fitted.append(session.apply(edit, loss, None if tracer is None else tracer.observe))
                checkpoint.save(session, fitted)
            if tracer is not None:
                tracer.record(fitted[-1].steps)
            scores = [
                _with_finite_kl(score(session.model, workplace.tokenizer, examination)) for examination in examinations
            ]
            answers = [
                ask(session.model, workplace.tokenizer, edit, self.seed) if edit.questions else {}
                for edit in self.edits
            ]
            after = perplexity(session.model, workplace.tokenizer, self.held_out_texts)
        trace = None if tracer is None else tracer.trace
        # No line of a results file can hold NaN or infinity, and no mean could be taken over them.
        json.dumps([*map(asdict, scores), answers, None if trace is None else asdict(trace)], allow_nan=False)
        return [
            self._outcome(
                position,
                scores=scores[position],
                answers=answers[position],
                perplexity=after if math.isfinite(after) else None,
                steps=fit.steps,
                ended=fit.ended,
                seconds=fit.seconds,
                trace=trace,
            )
            for position, fit in enumerate(fitted)
        ]

    def _failed(self, position: int, error: Exception) -> EditOutcome:
        return self._outcome(position, error=f"{type(error).__name__}: {error}")

    def _outcome(self, position: int, **values: Any) -> EditOutcome:
        edit = self.edits[position]
        return EditOutcome(
            data=self.data,
            seed=self.seed,
            method=self.method,
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


def _with_finite_kl(scores: Scores) -> Scores:
    return scores if scores.kl is None or math.isfinite(scores.kl) else replace(scores, kl=None)


def checkpoint_path(folder: Path, key: SequenceKey) -> Path:
    """Where the state of a sequence under way is kept."""
    return folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.pt"
