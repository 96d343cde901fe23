"""A row of edits trained in rounds over all of them, in place of each to its end before the next.

The order of LocFT-BF (Yang et al., 2025, https://arxiv.org/abs/2509.22072), for any loss and any of the lab's methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from overtone.cut_off import without_effect
from overtone.lab.data.edit import Edit
from overtone.lab.edit.anchored import AnchoredTexts
from overtone.lab.edit.many import Job, at_least_float32, target_texts
from overtone.lab.model.positions import Text, logits_at
from overtone.lab.model.targets import IGNORE_INDEX, TargetBatch, encode_targets
from overtone.token_loss import EditLoss

_LossOf = Callable[[Tensor], tuple[Tensor, bool]]
"""From the logits (P, V) of an edit's texts to its token losses, and whether they are held."""


class Rounds:
    """The steps of a row of edits that share an optimiser: which edits each step has, and its loss.

    A step takes some of the edits, and its loss is the mean of theirs; one whose own loss is held adds nothing. A round
    is over when each edit has had its turn, and the next one shuffles them anew. What a loss compares with the unedited
    model, it compares with the model before the first step.

    Attributes:
        texts: of all edits, in their order, as `overtone.lab.edit.many.Job` takes them.
        steps_a_round: how many steps a round takes.
        steps: for each edit, in how many steps so far it was not held.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        edits: Sequence[Edit],
        build_loss: Callable[[], EditLoss],
        *,
        edits_a_step: int,
        seed: int,
    ) -> None:
        """Take the edits.

        Args:
            model: before the first edit.
            tokenizer: of the model.
            edits: at least one.
            build_loss: makes the loss of one edit, which may remember what it has seen of it.
            edits_a_step: how many edits share a step; the last one of a round may have fewer.
            seed: of the shuffles.

        Raises:
            ValueError: no edits, fewer than one a step, or as `encode_targets`.
        """
        if not edits:
            raise ValueError("edits is empty: there is nothing to train")
        if edits_a_step < 1:
            raise ValueError(f"edits_a_step must be at least 1, got {edits_a_step}")
        self.texts: list[Text] = []
        self.steps = [0] * len(edits)
        self.steps_a_round = math.ceil(len(edits) / edits_a_step)
        self._edits_a_step = edits_a_step
        self._seed = seed
        self._edit_of: list[int] = []
        self._loss_of: list[_LossOf] = []
        for number, edit in enumerate(edits):
            batch = encode_targets(tokenizer, edit.pairs, model.device)
            texts, loss_of = _read(batch, build_loss(), tokenizer.bos_token_id)
            with torch.no_grad():
                loss_of(at_least_float32(logits_at(model, texts)))  # the one that anchors and references are taken from
            self.texts += texts
            self._edit_of += [number] * len(texts)
            self._loss_of.append(loss_of)

    def rows(self, step: int) -> list[int]:
        """The places in `texts` of those that take part in a step, counted from 0."""
        number, place = divmod(step, self.steps_a_round)
        edits = list(range(len(self._loss_of)))
        Random(f"round {self._seed} {number}").shuffle(edits)
        chosen = set(edits[place * self._edits_a_step :][: self._edits_a_step])
        return [row for row, edit in enumerate(self._edit_of) if edit in chosen]

    def job(self, start: Tensor) -> Job:
        """All rounds, from the weights before the first edit."""
        return Job(tuple(self.texts), self.mean, start, rows=self.rows, steps_a_round=self.steps_a_round)

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
        means, are_held = [], []
        for edit, own in zip(counts, logits.split(list(counts.values())), strict=True):
            losses, held = self._loss_of[edit](own)
            self.steps[edit] += not held
            means.append(losses.mean().detach() if held else losses.mean())
            are_held.append(held)
        mean = torch.stack(means).mean()
        return without_effect(mean) if all(are_held) else mean


def _read(batch: TargetBatch, loss: EditLoss, bos_token_id: int | None) -> tuple[list[Text], _LossOf]:
    if loss.anchor == 0:
        labels = batch.labels[batch.labels != IGNORE_INDEX]
        return target_texts(batch), lambda logits: loss(logits, labels)
    anchored = AnchoredTexts(batch, bos_token_id)

    def loss_of(logits: Tensor) -> tuple[Tensor, bool]:
        target_logits, targets, moved = anchored.read(loss, logits)
        return loss(target_logits, targets, anchored=moved)

    return anchored.texts, loss_of
