"""Many independent edits of one model in one batch, each with weights of its own.

A step of a single edit is bound by reading the model's weights, not by arithmetic, so a batch of eight costs little
more than one. Every edit keeps its own weights, its own Adam, and its own hold: the numbers are those of
the edits made one after the other, up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from overtone.lab.edit.weights import frozen
from overtone.lab.model.positions import Text, logits_at
from overtone.lab.model.targets import IGNORE_INDEX, TargetBatch

Objective = Callable[[Tensor, Sequence[int]], Tensor]
"""From the logits (P, V) at the positions of the texts in a step, text after text, and the places of these texts in the
job's list, to a scalar. The logits are at least float32."""

Watch = Callable[[float, Tensor, Sequence[int]], Iterable[str]]
"""From the loss, and what the objective got, before an update to the names of what has come about: the weights are
kept."""


class OpenedWeights(Protocol):
    """What an editing method opens for training: for every edit one flat vector of weights."""

    def start(self, seed: int) -> Tensor:
        """The weights (W,) before an edit; the seed is that of methods that begin at random weights."""

    def prepare(self, texts: Sequence[Text]) -> list[Any]:
        """What of each text's pass does not depend on the opened weights, worked out once."""

    def applied(
        self, weights: Sequence[Tensor], rows: Sequence[int], prepared: Sequence[Any]
    ) -> AbstractContextManager[None]:
        """Use the weights in the model's passes.

        Args:
            weights: (W,) for each edit.
            rows: how many rows of the batch each edit has; they follow each other.
            prepared: for each row, what `prepare` gave; empty: passes run from the model's first block on.
        """


@dataclass(frozen=True)
class Job:
    """One edit to fit, or a row of edits that are fitted together.

    Attributes:
        texts: that the edit is fitted on.
        objective: the loss of one step.
        start: the weights (W,) before it.
        watch: says before each update under which names to keep the weights; the first time counts.
        until: end once the weights are kept under all of these names; none: run all steps.
        rows: from the number of steps before it to the places in `texts` of those that take part in a step; None: all
            of them in every step.
        steps_a_round: after how many steps all texts have had their turn. The limit of steps counts such rounds, and
            the edit ends held after one whose steps all were.
    """

    texts: tuple[Text, ...]
    objective: Objective
    start: Tensor
    watch: Watch | None = None
    until: frozenset[str] = frozenset()
    rows: Callable[[int], Sequence[int]] | None = None
    steps_a_round: int = 1


@dataclass(frozen=True)
class Snapshot:
    """The weights (W,) of an edit after some steps."""

    weights: Tensor
    steps: int


@dataclass(frozen=True)
class FittedEdit:
    """How one job went.

    Attributes:
        weights: (W,), at the end.
        losses: before each update, and those of the steps that were held.
        steps: optimiser steps taken, without those that were held.
        ended: "steps" or "held", as in `overtone.lab.edit.fit.FitTrace`.
        seconds: its share of the wall-clock time of the steps that it took part in.
        snapshots: the weights that the watch had kept, by name.
    """

    weights: Tensor
    losses: tuple[float, ...]
    steps: int
    ended: str
    seconds: float
    snapshots: Mapping[str, Snapshot]


def target_job(
    batch: TargetBatch,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    *,
    watch: Watch | None = None,
    until: Iterable[str] = (),
) -> Job:
    """The job of fitting a batch's target tokens, all of them in every step.

    Args:
        batch: the edit's prompts and targets.
        loss_of: from logits (N, V) and labels (N,) to a scalar, as `overtone.lab.edit.fit.fit` takes it.
        start: the weights before the edit.
        watch, until: of the job.
    """
    texts = tuple(target_texts(batch))
    labels = batch.labels[batch.labels != IGNORE_INDEX]
    return Job(texts, lambda logits, _: loss_of(logits, labels), start, watch, frozenset(until))


def target_texts(batch: TargetBatch) -> list[Text]:
    """The texts of a batch without their padding, with the positions that predict target tokens."""
    lengths = batch.attention_mask.sum(dim=1).tolist()
    return [
        Text.before(ids[:length], labels[:length] != IGNORE_INDEX)
        for ids, labels, length in zip(batch.input_ids, batch.labels, lengths, strict=True)
    ]


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if it has a smaller type."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def fit_many(
    model: Any, opened: OpenedWeights, jobs: Sequence[Job], *, steps: int, lr: float, at_once: int = 8
) -> list[FittedEdit]:
    """Fit edits with Adam, several at once; where one ends, the next begins.

    Args:
        model: the unedited model, in evaluation mode.
        opened: the weights to move.
        jobs: the edits.
        steps: of an edit at most; of a job in rounds, how many rounds.
        lr: Adam's learning rate.
        at_once: how many edits share a pass.

    Raises:
        RuntimeError: a loss is NaN or infinite.
        ValueError: steps, at_once or a job's steps_a_round is less than 1, or a job's rows name none of its texts for a
            step.
    """
    rounds = [("steps_a_round", job.steps_a_round) for job in jobs]
    for name, value in (("steps", steps), ("at_once", at_once), *rounds):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    with frozen(model):
        return _fit_many(model, opened, jobs, steps, lr, at_once)


def _fit_many(
    model: Any, opened: OpenedWeights, jobs: Sequence[Job], steps: int, lr: float, at_once: int
) -> list[FittedEdit]:
    fitted: dict[int, FittedEdit] = {}
    # Edits of one length share a pass, so that little of it is padding.
    waiting = sorted(enumerate(jobs), key=lambda item: max(len(text.ids) for text in item[1].texts))
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            index, job = waiting.pop()
            running.append(_Running(index, job, opened.prepare(job.texts), steps, lr))
        begin = time.perf_counter()
        _step(model, opened, running)
        seconds = (time.perf_counter() - begin) / len(running)
        for edit in running:
            edit.seconds += seconds
        fitted |= {edit.index: edit.result() for edit in running if edit.ended is not None}
        running = [edit for edit in running if edit.ended is None]
    return [fitted[index] for index in range(len(jobs))]


class _Running:
    """An edit that is being fitted."""

    def __init__(self, index: int, job: Job, prepared: list[Any], steps: int, lr: float) -> None:
        self.index = index
        self.job = job
        self.rows: Sequence[int] = range(len(job.texts))
        self._prepared = prepared
        self.seconds = 0.0
        self.ended: str | None = None
        self.weights = job.start.detach().clone().requires_grad_()
        self._limit = steps * job.steps_a_round
        self._lr = lr
        self._taken = 0
        self._taken_before_round = 0
        self._losses: list[float] = []
        self._snapshots: dict[str, Snapshot] = {}
        self._optimizer = torch.optim.Adam([self.weights], lr=lr)

    @property
    def texts(self) -> list[Text]:
        """Those that take part in the step."""
        return [self.job.texts[row] for row in self.rows]

    @property
    def prepared(self) -> list[Any]:
        """Of `texts`."""
        return [self._prepared[row] for row in self.rows]

    def choose_rows(self) -> None:
        """Settle which texts take part in the step."""
        if self.job.rows is not None:
            self.rows = self.job.rows(len(self._losses))
            if not self.rows or not all(0 <= row < len(self.job.texts) for row in self.rows):
                raise ValueError(
                    f"rows must name some of the job's {len(self.job.texts)} texts, counted from 0, got "
                    f"{list(self.rows)} after {len(self._losses)} steps"
                )

    def logits_gradient(self, logits: Tensor) -> Tensor | None:
        """Look at the logits before an update; their gradient, or None where the edit ends here."""
        leaf = at_least_float32(logits).detach().requires_grad_()
        loss = self.job.objective(leaf, self.rows)
        value = loss.item()
        self._losses.append(value)
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {value} after {self._taken} steps with lr={self._lr}: lower lr")
        if self.job.watch is not None:
            new = [name for name in self.job.watch(value, leaf.detach(), self.rows) if name not in self._snapshots]
            if new:
                # One for all of them: what is measured of it need be measured once.
                self._snapshots |= dict.fromkeys(new, Snapshot(self.weights.detach().clone(), self._taken))
        if self.job.until and self.job.until <= self._snapshots.keys():
            self.ended = "held"
            return None
        loss.backward()
        self._taken += leaf.grad is not None
        if len(self._losses) % self.job.steps_a_round == 0:
            if self._taken == self._taken_before_round:
                self.ended = "held"
            elif len(self._losses) == self._limit:
                self.ended = "steps"
            self._taken_before_round = self._taken
        return None if leaf.grad is None else leaf.grad.to(logits.dtype)

    def update(self) -> None:
        """Take the step for which the weights have their gradient."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def result(self) -> FittedEdit:
        """How it went, once it has ended."""
        assert self.ended is not None
        return FittedEdit(
            self.weights.detach(), tuple(self._losses), self._taken, self.ended, self.seconds, self._snapshots
        )


def _step(model: Any, opened: OpenedWeights, running: Sequence[_Running]) -> None:
    for edit in running:
        edit.choose_rows()
    texts = [text for edit in running for text in edit.texts]
    prepared = [part for edit in running for part in edit.prepared]
    rows = [len(edit.rows) for edit in running]
    with opened.applied([edit.weights for edit in running], rows, prepared):
        logits = logits_at(model, texts)
    counts = [sum(len(text.positions) for text in edit.texts) for edit in running]
    # Each edit's loss sees its own logits alone, so one that ends takes nothing from the others.
    gradients = [edit.logits_gradient(own) for edit, own in zip(running, logits.detach().split(counts), strict=True)]
    moving = [edit for edit, gradient in zip(running, gradients, strict=True) if gradient is not None]
    if not moving:
        return
    own_logits = logits.split(counts)
    torch.autograd.backward(
        [own for own, gradient in zip(own_logits, gradients, strict=True) if gradient is not None],
        [gradient for gradient in gradients if gradient is not None],
        inputs=[edit.weights for edit in moving],
    )
    for edit in moving:
        edit.update()
