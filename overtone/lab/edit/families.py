"""Losses that one run of an edit serves: they differ in nothing but the moment at which they hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from overtone.functional import ground_truth_check
from overtone.lab.edit.anchored import AnchoredTexts
from overtone.lab.edit.many import FittedEdit, Job, Snapshot, target_job
from overtone.lab.model.targets import IGNORE_INDEX, TargetBatch
from overtone.token_loss import LossSpec


def families(losses: Iterable[LossSpec]) -> list[list[LossSpec]]:
    """The losses in groups whose edits take the same steps until they are held."""
    groups: dict[tuple[object, ...], list[LossSpec]] = {}
    for loss in losses:
        groups.setdefault(_steps(loss), []).append(loss)
    return list(groups.values())


def _steps(loss: LossSpec) -> tuple[object, ...]:
    if loss.kind not in ("cross_entropy", "overtone"):
        return (loss.name,)
    fields = tuple((name, value) for name, value in loss.fields.items() if name != "hold")
    hold = loss.fields.get("hold")
    words = hold if isinstance(hold, (tuple, list)) else (hold,)
    # OverTone's hold on first choices also keeps clipped tokens from settling, which changes its steps.
    return (loss.kind, fields, loss.kind == "overtone" and "correct" in words)


class Family:
    """One run of an edit for several losses, which goes on until the last of them is held."""

    def __init__(self, losses: Iterable[LossSpec], method: str) -> None:
        """Take the losses of one of `families`, and the method whose settings they have."""
        self._losses = {loss.name: loss.build(method) for loss in losses}

    def job(self, batch: TargetBatch, start: Tensor, bos_token_id: int | None) -> Job:
        """The run, from the weights before the edit."""
        first, *others = self._losses.values()
        if first.anchor > 0:
            return self._anchored_job(AnchoredTexts(batch, bos_token_id), start)
        if not others:
            return target_job(batch, first.mean, start)
        labels = batch.labels[batch.labels != IGNORE_INDEX]

        def mean_unheld(logits: Tensor, labels: Tensor) -> Tensor:
            return first(logits, labels, may_hold=False)[0].mean()

        # A loss without a hold never is, and so takes all steps.
        return target_job(
            batch,
            mean_unheld,
            start,
            watch=lambda _, logits, rows: self._held(logits, labels, None),
            until=self._losses,
        )

    def _anchored_job(self, texts: AnchoredTexts, start: Tensor) -> Job:
        first, *others = self._losses.values()
        if not others:
            return Job(tuple(texts.texts), lambda logits, _: texts.mean(first, logits), start)
        moved: Tensor | None = None

        def mean_unheld(logits: Tensor, _: Sequence[int]) -> Tensor:
            nonlocal moved
            target_logits, labels, anchored = texts.read(first, logits)
            moved = anchored.moved
            return first(target_logits, labels, may_hold=False, anchored=anchored)[0].mean()

        def held(_: float, logits: Tensor, rows: Sequence[int]) -> list[str]:
            # Asked after the objective, of the same logits: the anchors are not measured twice.
            return self._held(logits[texts.is_target], texts.labels, moved)

        return Job(tuple(texts.texts), mean_unheld, start, held, frozenset(self._losses))

    @torch.no_grad()
    def _held(self, logits: Tensor, labels: Tensor, moved: Tensor | None) -> list[str]:
        """The losses that would hold a step with these logits (N, V) of the target tokens."""
        first = next(iter(self._losses.values()))
        distance = (first.distance or first.token_loss)(logits, labels)
        correct = ground_truth_check(logits, labels)
        return [n for n, loss in self._losses.items() if loss.hold.is_met_here(distance, loss.epsilon, correct, moved)]

    def results(self, fitted: FittedEdit) -> dict[str, tuple[Snapshot, str]]:
        """For each loss, the weights with which its edit ends, and how it ends."""
        end = Snapshot(fitted.weights, fitted.steps), fitted.ended
        return {name: (fitted.snapshots[name], "held") if name in fitted.snapshots else end for name in self._losses}
