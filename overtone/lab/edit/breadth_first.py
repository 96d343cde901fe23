"""A row of edits trained in passes over all of them, in place of each to its end before the next.

The order of LocFT-BF (Yang et al., 2025, https://arxiv.org/abs/2509.22072), for any loss and any of the lab's methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Tensor

from overtone.cut_off import without_effect
from overtone.lab.edit.anchored import AnchoredTexts
from overtone.lab.edit.many import Job, target_texts
from overtone.lab.model.positions import Text
from overtone.lab.model.targets import IGNORE_INDEX, TargetBatch
from overtone.token_loss import EditLoss

_LossOf = Callable[[Tensor], tuple[Tensor, bool]]
"""From the logits (P, V) of an edit's texts to its token losses, and whether they are held."""


class Passes:
    """The steps of a row of edits that share an optimiser: which edits each step has, and its loss.

    A step takes some of the edits, and its loss is the mean of theirs; one whose own loss is held adds nothing. A pass
    is over when each edit has had its turn, and the next one shuffles them anew.

    Attributes:
        texts: of all edits, in their order, as `overtone.lab.edit.many.Job` takes them.
        steps_a_pass: how many steps a pass takes.
        steps: for each edit, in how many steps so far it was not held.
    """

    def __init__(
        self, batches: Sequence[TargetBatch], loss: EditLoss, bos_token_id: int | None, *, edits_a_step: int, seed: int
    ) -> None:
        """Take the edits.

        Args:
            batches: an edit's prompts and targets each.
            loss: of every edit.
            bos_token_id: the tokenizer's, which no anchor stands on.
            edits_a_step: how many edits share a step; the last one of a pass may have fewer.
            seed: of the shuffles.
        """
        self.texts: list[Text] = []
        self.steps = [0] * len(batches)
        self.steps_a_pass = math.ceil(len(batches) / edits_a_step)
        self._edits_a_step = edits_a_step
        self._seed = seed
        self._edit_of: list[int] = []
        self._loss_of: list[_LossOf] = []
        for edit, batch in enumerate(batches):
            texts, loss_of = _read(batch, loss, bos_token_id)
            self.texts += texts
            self._edit_of += [edit] * len(texts)
            self._loss_of.append(loss_of)

    def rows(self, step: int) -> list[int]:
        """The places in `texts` of those that take part in a step, counted from 0."""
        number, place = divmod(step, self.steps_a_pass)
        edits = list(range(len(self._loss_of)))
        Random(f"pass {self._seed} {number}").shuffle(edits)
        chosen = edits[place * self._edits_a_step :][: self._edits_a_step]
        return [row for row, edit in enumerate(self._edit_of) if edit in chosen]

    def job(self, start: Tensor) -> Job:
        """All passes, from the weights before the first edit."""
        return Job(tuple(self.texts), self.mean, start, rows=self.rows, steps_a_pass=self.steps_a_pass)

    def mean(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """The loss of one step; of one whose edits are all held cut off from the model.

        Args:
            logits: (P, V), at the positions of the texts in the step, text after text.
            rows: as `rows` gave them.
        """
        counts: dict[int, int] = {}
        for row in rows:
            edit = self._edit_of[row]
            counts[edit] = counts.get(edit, 0) + len(self.texts[row].positions)
        read = [self._loss_of[edit](own) for edit, own in zip(counts, logits.split(list(counts.values())), strict=True)]
        for edit, (_, held) in zip(counts, read, strict=True):
            self.steps[edit] += not held
        mean = torch.stack([losses.mean().detach() if held else losses.mean() for losses, held in read]).mean()
        return mean if mean.requires_grad else without_effect(torch.stack([losses.mean() for losses, _ in read]).mean())


def _read(batch: TargetBatch, loss: EditLoss, bos_token_id: int | None) -> tuple[list[Text], _LossOf]:
    if loss.anchor == 0:
        labels = batch.labels[batch.labels != IGNORE_INDEX]
        return target_texts(batch), lambda logits: loss(logits, labels)
    anchored = AnchoredTexts(batch, bos_token_id)

    def loss_of(logits: Tensor) -> tuple[Tensor, bool]:
        target_logits, targets, moved = anchored.read(loss, logits)
        return loss(target_logits, targets, anchored=moved)

    return anchored.texts, loss_of
