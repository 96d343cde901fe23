"""Sequences of edits made together in one batch, with the scores that need no generation."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from overtone.lab.data.edit import Edit
from overtone.lab.edit.breadth_first import Rounds
from overtone.lab.edit.families import Family, families
from overtone.lab.edit.many import FittedEdit, OpenedWeights, Snapshot, at_least_float32, fit_many
from overtone.lab.edit.methods import METHODS, MethodSettings
from overtone.lab.model.targets import encode_targets
from overtone.lab.model.workplace import Workplace
from overtone.lab.results.record import EditRecord, SequenceKey
from overtone.lab.run.task import SequenceTask, with_finite_kl
from overtone.lab.score.batched import Exam, examine_many, score_many
from overtone.lab.score.completions import say_many
from overtone.lab.score.scores import Scores
from overtone.token_loss import parse

logger = logging.getLogger(__name__)

_Made = tuple[int, str, float]
"""The steps of an edit, how it ended, and its seconds."""


@dataclass(frozen=True)
class TogetherTask:
    """Runs of one method and length, whose edits share passes.

    Beside the time that it takes, this differs from performing the tasks one by one in what is measured: the scores
    that need a generation or a held-out text are left out, but for `Scores.said`, which can be asked for.

    Attributes:
        runs: tasks of the lab's own methods, untraced, alike in all but their edits and losses. Those of a run differ
            in nothing but the moment at which their loss holds.
        at_once: how many runs share a pass.
        generates: let the edited models say what they answer.
    """

    runs: tuple[tuple[SequenceTask, ...], ...] = field(repr=False)
    at_once: int
    generates: bool = False

    @property
    def tasks(self) -> list[SequenceTask]:
        """Of all runs."""
        return [task for run in self.runs for task in run]

    def perform(self, workplace: Workplace) -> list[list[EditRecord]]:
        """The records of each task; where one fails, its own say so and the others are made without it.

        Raises:
            NotRestoredError, OSError, MemoryError, torch.OutOfMemoryError: as `SequenceTask.perform`.
        """
        try:
            records = self._perform(workplace)
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if len(self.tasks) > 1:
                logger.warning("%d sequences are made one by one, since one of them failed: %s", len(self.tasks), error)
                alone = (replace(self, runs=((task,),)) for task in self.tasks)
                return [records for task in alone for records in task.perform(workplace)]
            logger.warning("%s failed: %s", self.tasks[0].key, error)
            records = [self.tasks[0].failed(error)]
        workplace.require_restored(self.tasks[0].method)
        return records

    def _perform(self, workplace: Workplace) -> list[list[EditRecord]]:
        first = self.tasks[0]
        assert first.settings is not None
        opened = _open(workplace, first.method, first.settings)
        made: dict[SequenceKey, list[_Made]] = {task.key: [] for task in self.tasks}
        weights: dict[SequenceKey, Tensor] = {}
        if first.settings.breadth_first is not None:
            for task, rounds, fitted in self._fit_in_rounds(workplace, opened, first.settings.breadth_first):
                share = fitted.seconds / len(rounds.steps)
                made[task.key] = [(steps, fitted.ended, share) for steps in rounds.steps]
                weights[task.key] = fitted.weights
        else:
            for position in range(first.length):
                for task, snapshot, ended, seconds in self._fit(workplace, opened, position, weights):
                    made[task.key].append((snapshot.steps, ended, seconds))
                    weights[task.key] = snapshot.weights
        examined = []
        for task in self.tasks:
            exams = _examine(workplace, task.method, first.settings, task.edits)
            examined += [(exam, weights[task.key]) for exam in exams]
        # Losses of one run that end it at the same step have the same weights, not equal ones.
        distinct = {(id(exam), id(own)): (exam, own) for exam, own in examined}
        known = dict(zip(distinct, self._score(workplace, opened, list(distinct.values())), strict=True))
        scores = iter([known[id(exam), id(own)] for exam, own in examined])
        return [
            [
                task.record(position, scores=next(scores), steps=steps, ended=ended, seconds=seconds)
                for position, (steps, ended, seconds) in enumerate(made[task.key])
            ]
            for task in self.tasks
        ]

    def _fit(
        self,
        workplace: Workplace,
        opened: OpenedWeights,
        position: int,
        weights: dict[SequenceKey, Tensor],
    ) -> Iterator[tuple[SequenceTask, Snapshot, str, float]]:
        """Make the edits at one place of all sequences, of which the weights so far are given."""
        settings = self.tasks[0].settings
        assert settings is not None
        of_runs, jobs = [], []
        for tasks in self.runs:
            task = tasks[0]
            family = Family((parse(task.loss) for task in tasks), task.method)
            start = weights[task.key] if position else _start(opened, task)
            batch = encode_targets(workplace.tokenizer, task.edits[position].pairs, workplace.model.device)
            jobs.append(family.job(batch, start, workplace.tokenizer.bos_token_id))
            of_runs.append(family)
        made = fit_many(workplace.model, opened, jobs, steps=settings.steps, lr=settings.lr, at_once=self.at_once)
        for tasks, family, edit in zip(self.runs, of_runs, made, strict=True):
            ends = family.results(edit)
            for task in tasks:
                snapshot, ended = ends[task.loss]
                yield task, snapshot, ended, _seconds(edit, snapshot)

    def _fit_in_rounds(
        self, workplace: Workplace, opened: OpenedWeights, edits_a_step: int
    ) -> Iterator[tuple[SequenceTask, Rounds, FittedEdit]]:
        """Make all edits of each sequence together."""
        settings = self.tasks[0].settings
        assert settings is not None
        of_tasks = [
            Rounds(
                workplace.model,
                workplace.tokenizer,
                task.edits,
                partial(parse(task.loss).build, task.method),
                edits_a_step=edits_a_step,
                seed=task.first_index,
            )
            for task in self.tasks
        ]
        jobs = [rounds.job(_start(opened, task)) for rounds, task in zip(of_tasks, self.tasks, strict=True)]
        made = fit_many(workplace.model, opened, jobs, steps=settings.steps, lr=settings.lr, at_once=self.at_once)
        yield from zip(self.tasks, of_tasks, made, strict=True)

    def _score(
        self, workplace: Workplace, opened: OpenedWeights, examined: list[tuple[Exam, Tensor]]
    ) -> Iterator[Scores]:
        scores = score_many(workplace.model, opened, examined)
        if not self.generates:
            yield from (with_finite_kl(score.summary()) for score in scores)
            return
        said = say_many(workplace.model, workplace.tokenizer, opened, examined)
        for score, own in zip(scores, said, strict=True):
            yield replace(with_finite_kl(score.summary()), said=own)


def together(tasks: Iterable[SequenceTask], at_once: int, *, generates: bool = False) -> list[TogetherTask]:
    """The tasks in groups, each of as many runs as share a pass, so that what is finished is soon on disk."""
    alike: dict[object, list[SequenceTask]] = defaultdict(list)
    for task in tasks:
        # After a row's first edit the losses have different weights, so no run is shared.
        block = task.sequence // at_once if task.length == 1 else None
        alike[task.data, task.seed, task.method, task.settings, task.length, block].append(task)
    found = []
    for own in alike.values():
        sharing = _sharing(own[0], at_once)
        blocks = _single_edits(own) if own[0].length == 1 else _rows(own, sharing)
        found += [TogetherTask(runs, sharing, generates) for runs in blocks]
    return found


def _sharing(task: SequenceTask, at_once: int) -> int:
    """How many runs like this one share a pass: in rounds the edits of a step share it already."""
    edits_a_step = None if task.settings is None else task.settings.breadth_first
    return at_once if edits_a_step is None else max(1, at_once // edits_a_step)


def _start(opened: OpenedWeights, task: SequenceTask) -> Tensor:
    """The weights before a sequence's first edit."""
    # Adam's steps would vanish in the rounding of half-precision weights.
    return at_least_float32(opened.start(task.first_index))


_Runs = tuple[tuple[SequenceTask, ...], ...]


def _single_edits(tasks: list[SequenceTask]) -> Iterator[_Runs]:
    """For each family of losses, a run of each edit."""
    for family in families(parse(loss) for loss in dict.fromkeys(task.loss for task in tasks)):
        runs: dict[int, list[SequenceTask]] = defaultdict(list)
        names = {loss.name for loss in family}
        for task in tasks:
            if task.loss in names:
                runs[task.sequence].append(task)
        yield tuple(map(tuple, runs.values()))


def _rows(tasks: list[SequenceTask], at_once: int) -> Iterator[_Runs]:
    for start in range(0, len(tasks), at_once):
        yield tuple((task,) for task in tasks[start : start + at_once])


def _seconds(edit: FittedEdit, snapshot: Snapshot) -> float:
    """What the edit would have taken had its run ended with the snapshot."""
    return edit.seconds * (snapshot.steps + 1) / len(edit.losses) if snapshot.steps < edit.steps else edit.seconds


@lru_cache(maxsize=2)
def _open(workplace: Workplace, method: str, settings: MethodSettings) -> OpenedWeights:
    return METHODS[method].open_many(workplace.model, settings)


@lru_cache(maxsize=32)
def _examine(workplace: Workplace, method: str, settings: MethodSettings, edits: Sequence[Edit]) -> list[Exam]:
    """Kept for the next losses and learning rates."""
    return examine_many(workplace.model, workplace.tokenizer, _open(workplace, method, settings), edits)
