"""Sequences of edits made together in one batch, with the scores that need no generation."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from overtone.lab.data.edit import Edit
from overtone.lab.edit.families import Family, families
from overtone.lab.edit.many import FittedEdit, OpenedWeights, Snapshot, fit_many
from overtone.lab.edit.methods import METHODS, MethodSettings
from overtone.lab.model.targets import encode_targets
from overtone.lab.model.workplace import Workplace
from overtone.lab.results.record import EditRecord, SequenceKey
from overtone.lab.run.task import SequenceTask, with_finite_kl
from overtone.lab.score.batched import Exam, examine_many, score_many
from overtone.token_loss import parse

logger = logging.getLogger(__name__)

_Made = tuple[int, str, float]
"""The steps of an edit, how it ended, and its seconds."""


@dataclass(frozen=True)
class TogetherTask:
    """Tasks of one method and length, whose edits share passes.

    Beside the time that it takes, this differs from performing the tasks one by one in what is measured: the scores
    that need a generation or a held-out text are left out.

    Attributes:
        tasks: of the lab's own methods, untraced, alike in all but their edits and losses.
        at_once: how many edits share a pass.
    """

    tasks: tuple[SequenceTask, ...] = field(repr=False)
    at_once: int

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
                alone = (TogetherTask((task,), self.at_once) for task in self.tasks)
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
        for position in range(first.length):
            for task, snapshot, ended, seconds in self._fit(workplace, opened, position, weights):
                made[task.key].append((snapshot.steps, ended, seconds))
                weights[task.key] = snapshot.weights
        examined = []
        for task in self.tasks:
            exams = _examine(workplace, task.method, first.settings, task.edits)
            examined += [(exam, weights[task.key]) for exam in exams]
        scores = iter(score_many(workplace.model, opened, examined))
        return [
            [
                task.record(
                    position,
                    scores=with_finite_kl(next(scores).summary()),
                    steps=steps,
                    ended=ended,
                    seconds=seconds,
                )
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
        runs, jobs = [], []
        for tasks in self._sharing(position):
            task = next(iter(tasks.values()))
            family = Family((parse(name) for name in tasks), task.method)
            start = weights[task.key] if position else opened.start(task.first_index)
            batch = encode_targets(workplace.tokenizer, task.edits[position].pairs, workplace.model.device)
            # Adam's steps would vanish in the rounding of half-precision weights.
            jobs.append(family.job(batch, start.float() if start.dtype.itemsize < 4 else start))
            runs.append((family, tasks))
        made = fit_many(workplace.model, opened, jobs, steps=settings.steps, lr=settings.lr, at_once=self.at_once)
        for (family, tasks), edit in zip(runs, made, strict=True):
            for name, (snapshot, ended) in family.results(edit).items():
                yield tasks[name], snapshot, ended, _seconds(edit, snapshot)

    def _sharing(self, position: int) -> Iterator[dict[str, SequenceTask]]:
        """Tasks by loss, in groups that can share a run: after the first edit their weights are no longer the same."""
        of_edits: dict[object, dict[str, SequenceTask]] = defaultdict(dict)
        for task in self.tasks:
            of_edits[task.sequence if position == 0 and task.length == 1 else task.key][task.loss] = task
        for by_loss in of_edits.values():
            for losses in families(map(parse, by_loss)):
                yield {loss.name: by_loss[loss.name] for loss in losses}


def together(tasks: Iterable[SequenceTask], at_once: int) -> list[TogetherTask]:
    """The tasks in groups, each of as many sequences as share a pass, with all losses."""
    groups: dict[object, list[SequenceTask]] = defaultdict(list)
    for task in tasks:
        groups[task.data, task.seed, task.method, task.settings, task.length, task.sequence // at_once].append(task)
    return [TogetherTask(tuple(group), at_once) for group in groups.values()]


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
